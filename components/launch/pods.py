"""The pod of every job: the one place where its rights, volumes and environment are set.

Every pod passes the Kubernetes policy "restricted" (Pod Security Standards), and none gets a token of the API server.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from components.launch import names
from components.launch.spec import JobSpec, digest
from trainer.parallel import nodes

NODE_RANK_ENV, NODES_ENV = nodes.RANK, nodes.NODES
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_POWERS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def pod_template(spec: JobSpec, container: str, env: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The pod template of a job.

    Args:
        spec: the job.
        container: name of its container; PyTorchJobs need `pytorch`, runtimes of TrainJobs `node`.
        env: further environment variables, as Kubernetes writes them.
    """
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(spec.user),
        "terminationGracePeriodSeconds": spec.grace_s,
        "containers": [
            {
                "name": container,
                "image": spec.image,
                "command": [escaped(word) for word in spec.command],
                "args": [escaped(word) for word in spec.args],
                "env": environment(spec) + (env or []),
                "resources": resources(spec),
                "securityContext": container_security(),
                "volumeMounts": [mount for _, mount in volumes(spec)],
            }
        ],
        "volumes": [volume for volume, _ in volumes(spec)],
    }
    optional = {
        "serviceAccountName": spec.service_account,
        "priorityClassName": spec.priority_class,
        "schedulerName": "volcano" if spec.scheduler == "volcano" else "",
        "nodeSelector": dict(spec.node_selector),
        "tolerations": [dict(each) for each in spec.tolerations],
        "imagePullSecrets": [{"name": name} for name in spec.pull_secrets],
    }
    pod |= {key: value for key, value in optional.items() if value}
    own = names.labels(spec.stage, spec.run) | {names.JOB_LABEL: spec.name}
    metadata: dict[str, Any] = {"labels": dict(spec.labels) | own}
    # A mesh's sidecar would keep finished pods running, and stand between the ranks.
    metadata["annotations"] = {"sidecar.istio.io/inject": "false", **spec.annotations}
    if spec.scheduler == "volcano":
        metadata["annotations"]["scheduling.volcano.sh/queue-name"] = spec.queue
    return {"metadata": metadata, "spec": pod}


def pod_security(user: int) -> dict[str, Any]:
    """The security context of a pod; files of mounted volumes belong to its group."""
    ids = (
        {"runAsUser": user, "runAsGroup": user, "fsGroup": user, "fsGroupChangePolicy": "OnRootMismatch"}
        if user
        else {}
    )
    return {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}


def container_security() -> dict[str, Any]:
    """The security context of a container: no rights, and nothing to write to but volumes."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def escaped(text: str) -> str:
    """The text as Kubernetes gives it back: in commands, arguments and variables it reads `$(NAME)` and `$$`."""
    return text.replace("$", "$$")


def environment(spec: JobSpec) -> list[dict[str, Any]]:
    """Variables by value, secrets by reference, in a fixed order."""
    plain = [{"name": name, "value": escaped(value)} for name, value in sorted(spec.env.items())]
    plain += [{"name": NODES_ENV, "value": str(spec.nodes)}]
    secret = []
    for name, place in sorted(spec.secret_env.items()):
        holder, _, key = place.partition("/")
        secret.append({"name": name, "valueFrom": {"secretKeyRef": {"name": holder, "key": key}}})
    return plain + secret


def from_label(name: str, label: str) -> dict[str, Any]:
    """A variable that holds the value of a label of its pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}


def resources(spec: JobSpec) -> dict[str, Any]:
    """What each pod asks for. Memory and devices are limits as well; processors may be borrowed while nobody needs them."""
    devices = {name: str(count) for name, count in sorted(spec.devices.items())}
    if spec.gpus:
        devices[spec.accelerator] = str(spec.gpus)
    limits = devices | ({"memory": spec.memory} if spec.memory else {})
    requests = limits | ({"cpu": spec.cpu} if spec.cpu else {})
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def number(quantity: str) -> Fraction:
    """The value of a Kubernetes quantity such as 500m, 1.5Gi or 2."""
    digits = quantity.rstrip("kKMGTim")
    suffix = quantity[len(digits) :]
    return Fraction(digits) * (Fraction(1, 1000) if suffix == "m" else _POWERS.get(suffix, 1))


def canonical(quantity: str) -> str:
    """The quantity as Kubernetes writes it back (1024Mi is 1Gi): Katib refuses a Job that it would write otherwise."""
    value = number(quantity)
    if value.denominator != 1:
        return f"{value * 1000}m"
    steps = [(unit, size) for unit, size in _POWERS.items() if unit.endswith("i") == quantity.endswith("i")]
    for unit, size in reversed(steps):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def volumes(spec: JobSpec) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Volumes and where they are mounted: /tmp, shared memory for the processes of a pod, and the claim."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),  # noqa: S108
    ]
    if spec.shm:
        memory = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": canonical(spec.shm)}}
        pairs.append((memory, {"name": "shm", "mountPath": "/dev/shm"}))  # noqa: S108
    if spec.claim:
        claim = {"name": "store", "persistentVolumeClaim": {"claimName": spec.claim}}
        pairs.append((claim, {"name": "store", "mountPath": spec.mount}))
    return pairs


def finished(obj: dict[str, Any], spec: JobSpec, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The object with the metadata that all we make has: name, namespace, labels, queue, owner and digest."""
    queue = {QUEUE_LABEL: spec.queue} if spec.scheduler == "kueue" else {}
    metadata: dict[str, Any] = {"name": spec.name}
    if spec.namespace:
        metadata["namespace"] = spec.namespace
    metadata["labels"] = names.labels(spec.stage, spec.run) | queue
    metadata["annotations"] = {**(annotations or {}), names.SPEC_ANNOTATION: digest(obj)}
    if spec.owner:
        metadata["ownerReferences"] = [dict(spec.owner)]
    return {"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": metadata, "spec": obj["spec"]}
