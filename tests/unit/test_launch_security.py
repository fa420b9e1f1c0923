"""The checker of the policy "restricted", by the fields that the Pod Security Standards list."""

import copy
from typing import Any

import pytest

from components.launch.security import enforced, pod_specs, restricted

GOOD: dict[str, Any] = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {"name": "a", "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    ],
    "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "c", "persistentVolumeClaim": {"claimName": "c"}}],
}
# What is changed -> the beginning of what must be said.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "host network": ({"hostNetwork": True}, "hostNetwork"),
    "host pid": ({"hostPID": True}, "hostPID"),
    "host path": ({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}, "volumes.h: hostPath"),
    "nfs": ({"volumes": [{"name": "n", "nfs": {}}]}, "volumes.n: nfs"),
    "root": ({"securityContext": {**GOOD["securityContext"], "runAsUser": 0}}, "securityContext.runAsUser"),
    "may be root": (
        {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}, "containers.a.securityContext.runAsNonRoot",
    ),
    "no seccomp": ({"securityContext": {"runAsNonRoot": True}}, "containers.a.securityContext.seccompProfile"),
    "unconfined": (
        {"securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "Unconfined"}}}, "securityContext.seccompProfile",
    ),
    "sysctl": (
        {"securityContext": {**GOOD["securityContext"], "sysctls": [{"name": "kernel.msgmax"}]}}, "securityContext.sysctls",
    ),
    "selinux": ({"securityContext": {**GOOD["securityContext"], "seLinuxOptions": {"user": "u"}}}, "securityContext.seLinux"),
}  # fmt: skip
CONTAINER: dict[str, tuple[dict[str, Any], str]] = {
    "privileged": ({"privileged": True}, "privileged"),
    "escalation": ({"allowPrivilegeEscalation": True}, "allowPrivilegeEscalation"),
    "capability": ({"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}, "capabilities.add"),
    "keeps some": ({"capabilities": {"drop": ["NET_RAW"]}}, "capabilities.drop"),
    "proc": ({"procMount": "Unmasked"}, "procMount"),
    "root": ({"runAsUser": 0}, "runAsUser"),
    "may be root": ({"runAsNonRoot": False}, "runAsNonRoot"),
    "unconfined": ({"seccompProfile": {"type": "Unconfined"}}, "seccompProfile"),
    "apparmor": ({"appArmorProfile": {"type": "Unconfined"}}, "appArmorProfile"),
}


def test_a_pod_that_the_policy_takes_has_no_violations() -> None:
    assert restricted(GOOD) == []
    assert restricted({**GOOD, "hostNetwork": False, "volumes": None}) == []


@pytest.mark.parametrize("name", BAD)
def test_each_field_of_a_pod(name: str) -> None:
    change, said = BAD[name]
    found = restricted({**GOOD, **change})
    assert [each for each in found if each.startswith(said)], found


@pytest.mark.parametrize("name", CONTAINER)
@pytest.mark.parametrize("kind", ["containers", "initContainers", "ephemeralContainers"])
def test_each_field_of_every_kind_of_container(name: str, kind: str) -> None:
    change, said = CONTAINER[name]
    pod = copy.deepcopy(GOOD)
    good = pod["containers"][0]
    pod[kind] = [{"name": "b", "securityContext": {**good["securityContext"], **change}}]
    found = restricted(pod)
    assert found
    assert all(each.startswith(f"{kind}.b.securityContext.{said}") for each in found), found


def test_a_container_without_any_context_fails_although_its_pod_has_one() -> None:
    pod = {**GOOD, "initContainers": [{"name": "init-pytorch"}]}
    assert {each.split(":")[0] for each in restricted(pod)} == {
        "initContainers.init-pytorch.securityContext.allowPrivilegeEscalation",
        "initContainers.init-pytorch.securityContext.capabilities.drop",
    }


def test_pods_are_found_wherever_they_stand() -> None:
    nested = {"spec": {"a": [{"template": {"spec": GOOD}}], "b": {"template": {"spec": GOOD}}}}
    assert list(pod_specs(nested)) == [GOOD, GOOD]


def test_the_label_of_a_namespace() -> None:
    key = "pod-security.kubernetes.io/enforce"
    assert enforced({"metadata": {"labels": {key: "restricted"}}})
    for labels in (None, {}, {key: "baseline"}, {"pod-security.kubernetes.io/warn": "restricted"}):
        assert not enforced({"metadata": {"name": "x", "labels": labels}})
