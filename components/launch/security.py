"""The Kubernetes policy "restricted" (Pod Security Standards), as a check of our own: before anything is sent, and in tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_SECCOMP = {"RuntimeDefault", "Localhost"}
_KINDS = ("initContainers", "containers", "ephemeralContainers")


def restricted(pod: Mapping[str, Any]) -> list[str]:
    """What the policy "restricted" would refuse a pod for, each with its field; empty for a pod that passes.

    Args:
        pod: `spec` of a pod.
    """
    found = [f"{key}: must not be true" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    for volume in pod.get("volumes") or []:
        kinds = set(volume) - {"name"}
        found += [f"volumes.{volume.get('name')}: {kind} is not allowed" for kind in sorted(kinds - _VOLUMES)]
    context = pod.get("securityContext") or {}
    found += [f"securityContext.{each}" for each in _shared(context)]
    names = [each.get("name") for each in context.get("sysctls") or []]
    found += [f"securityContext.sysctls: {name} is not allowed" for name in names if name not in _SYSCTLS]
    for kind in _KINDS:
        for container in pod.get(kind) or []:
            where = f"{kind}.{container.get('name')}"
            found += [f"{where}.{each}" for each in _container(container, context)]
    return found


def enforced(namespace: Mapping[str, Any]) -> bool:
    """Whether a Namespace enforces the policy "restricted" by its labels."""
    labels = (namespace.get("metadata") or {}).get("labels") or {}
    return bool(labels.get("pod-security.kubernetes.io/enforce") == "restricted")


def pod_specs(obj: Any) -> Iterator[dict[str, Any]]:
    """Every pod's `spec` in an object, whatever its kind."""
    if isinstance(obj, dict):
        if isinstance(obj.get("containers"), list):
            yield obj
            return
        for value in obj.values():
            yield from pod_specs(value)
    elif isinstance(obj, list):
        for value in obj:
            yield from pod_specs(value)


def _shared(context: Mapping[str, Any]) -> Iterator[str]:
    """What a context of a pod or of a container must not say."""
    if context.get("runAsUser") == 0:
        yield "runAsUser: must not be 0"
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot: must not be false"
    linux = context.get("seLinuxOptions") or {}
    if linux.get("type", "") not in _SELINUX or linux.get("user") or linux.get("role"):
        yield "seLinuxOptions: neither user, role nor another type than of a container"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "windowsOptions.hostProcess: must not be true"
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in _SECCOMP:
        yield "appArmorProfile.type: must be RuntimeDefault or Localhost"
    if "seccompProfile" in context and (context["seccompProfile"] or {}).get("type") not in _SECCOMP:
        yield "seccompProfile.type: must be RuntimeDefault or Localhost"


def _container(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one container, given the context of its pod."""
    context = container.get("securityContext") or {}
    capabilities = context.get("capabilities") or {}
    yield from (f"securityContext.{each}" for each in _shared(context))
    if context.get("privileged"):
        yield "securityContext.privileged: must not be true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "securityContext.allowPrivilegeEscalation: must be false"
    if context.get("procMount", "Default") != "Default":
        yield "securityContext.procMount: must be Default"
    if "ALL" not in (capabilities.get("drop") or []):
        yield "securityContext.capabilities.drop: must hold ALL"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield "securityContext.capabilities.add: only NET_BIND_SERVICE is allowed"
    if not (context.get("runAsNonRoot") or pod.get("runAsNonRoot")):
        yield "securityContext.runAsNonRoot: must be true, here or for the pod"
    if "seccompProfile" not in context and "seccompProfile" not in pod:
        yield "securityContext.seccompProfile: must be set, here or for the pod"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "ports: hostPort is not allowed"
