"""What the webhooks of the operators would refuse, and what they take although it never runs: a port, with our additions.

Each rule yields (dotted path, what is wrong). Seen on Kubernetes 1.33, training operator 1.9.4, trainer 2.3.0, Katib 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from components.launch import names, pods, pytorchjob, trainjob
from components.launch.security import pod_specs, restricted
from trainer.errors import ConfigError

Problem = tuple[str, str]
_RESTARTS = ("Always", "OnFailure", "Never", "ExitCode")
_BACKENDS = ("c10d", "etcd", "etcd-v2")
_RESERVED = re.compile(r"PET_.*|MASTER_ADDR|MASTER_PORT|WORLD_SIZE|RANK|LOCAL_RANK|KATIB_TRIAL_NAME")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
# Seconds that a finished job must stay for its end to be seen, by a watch that an outage broke off perhaps.
_MIN_TTL = 60
# Katib appends `-` and eight characters to an Experiment's name for a trial's.
TRIAL = "-12345678"


def suffix(obj: Mapping[str, Any]) -> str:
    """The longest that a controller appends to the name of an object for pods and what they are called in the network."""
    spec = obj.get("spec") or {}
    if obj.get("kind") == "PyTorchJob":
        workers = (spec.get("pytorchReplicaSpecs") or {}).get("Worker") or {}
        return f"-worker-{max(0, int(workers.get('replicas') or 1) - 1)}"
    if obj.get("kind") == "TrainJob":
        count = int((spec.get("trainer") or {}).get("numNodes") or 1)
        return f"-{trainjob.REPLICATED_JOB}-0-{count - 1}-12345"
    return ""


def of_name(obj: Mapping[str, Any], extra: str = "", limit: int = names.MAX_NAME) -> Iterator[Problem]:
    """DNS labels, short enough for pods and services."""
    try:
        names.check_name((obj.get("metadata") or {}).get("name") or "", extra or suffix(obj), limit)
    except ConfigError as error:
        yield "metadata.name", error.message


def of_pods(obj: Mapping[str, Any], is_restricted: bool) -> Iterator[Problem]:
    """Every pod: its image, variables, memory and, in a namespace that enforces it, the policy restricted."""
    for pod in pod_specs(obj):
        if is_restricted:
            yield from ((f"pod.{each.split(': ')[0]}", each.split(": ", 1)[1]) for each in restricted(pod))
        for container in pod.get("containers") or []:
            yield from _of_container(container, pod)


def _of_container(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[Problem]:
    if not container.get("image"):
        yield "pod.image", "must be named"
    seen: set[str] = set()
    for each in container.get("env") or []:
        name = each.get("name", "")
        if name in seen:
            yield f"pod.env.{name}", "is set twice, by value and from a secret perhaps"
        if _RESERVED.fullmatch(name):
            yield f"pod.env.{name}", "is set by the operator, which wins"
        seen.add(name)
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for name, value in requests.items():
        if not _QUANTITY.fullmatch(str(value)):
            yield f"pod.resources.{name}", f"{value!r} is no quantity such as 2, 500m or 8Gi"
        elif name in limits and pods.number(str(value)) > pods.number(str(limits[name])):
            yield f"pod.resources.{name}", f"asks for {value}, more than its limit {limits[name]}"
    sizes = [(each.get("emptyDir") or {}) for each in pod.get("volumes") or []]
    shared = [str(each["sizeLimit"]) for each in sizes if each.get("medium") == "Memory" and each.get("sizeLimit")]
    memory = str(limits.get("memory", ""))
    if _QUANTITY.fullmatch(memory) and any(pods.number(each) > pods.number(memory) for each in shared):
        yield "pod.shm", f"{shared[0]} of shared memory count as memory of the container, which has {memory}"


def of_pytorchjob(obj: Mapping[str, Any], is_restricted: bool) -> Iterator[Problem]:
    """The operator's webhook, and what it lets pass."""
    spec = obj.get("spec") or {}
    replicas = spec.get("pytorchReplicaSpecs") or {}
    root = "spec.pytorchReplicaSpecs"
    if not replicas:
        yield root, "must be given"
    for role, replica in replicas.items():
        yield from _of_replica(role, replica or {}, f"{root}.{role}")
    if is_restricted and {"Master", "Worker"} <= set(replicas):
        yield (
            f"{root}.Master",
            "the operator gives workers beside a Master an init container that the policy restricted refuses: "
            "the job would wait for ever",
        )
    count = str(spec.get("nprocPerNode", "auto"))
    if count not in ("auto", "cpu", "gpu") and not (count.isdigit() and int(count) > 0):
        yield "spec.nprocPerNode", f"must be auto, cpu, gpu or a number above 0 (given {count!r})"
    policy = spec.get("runPolicy") or {}
    if policy.get("cleanPodPolicy", "None") not in ("None", "Running", "All"):
        yield "spec.runPolicy.cleanPodPolicy", f"must be None, Running or All (given {policy['cleanPodPolicy']!r})"
    yield from _of_ttl(policy, "spec.runPolicy")
    if policy.get("managedBy") not in (None, "kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue"):
        yield "spec.runPolicy.managedBy", f"{policy['managedBy']!r} is unknown"
    gang, total = (
        policy.get("schedulingPolicy") or {},
        sum(int(each.get("replicas") or 1) for each in replicas.values()),
    )
    if int(gang.get("minAvailable") or 0) > total:
        yield "spec.runPolicy.schedulingPolicy.minAvailable", f"waits for more pods than the {total} that there are"
    if spec.get("elasticPolicy"):
        yield from _of_elastic(spec, replicas)


def _of_ttl(spec: Mapping[str, Any], path: str) -> Iterator[Problem]:
    if spec.get("ttlSecondsAfterFinished", _MIN_TTL) < _MIN_TTL:
        yield f"{path}.ttlSecondsAfterFinished", f"it is gone before its end is seen; must be at least {_MIN_TTL}"


def _of_replica(role: str, replica: Mapping[str, Any], path: str) -> Iterator[Problem]:
    count = replica.get("replicas", 1)
    if role not in ("Master", "Worker"):
        yield path, "must be Master or Worker"
    if role == "Master" and count != 1:
        yield f"{path}.replicas", f"must be 1 (given {count})"
    if count < 1:
        yield f"{path}.replicas", f"must be at least 1 (given {count})"
    if replica.get("restartPolicy", "OnFailure") not in _RESTARTS:
        yield f"{path}.restartPolicy", f"must be one of {', '.join(_RESTARTS)} (given {replica['restartPolicy']!r})"
    pod = (replica.get("template") or {}).get("spec") or {}
    if pytorchjob.CONTAINER not in [each.get("name") for each in pod.get("containers") or []]:
        yield f"{path}.template.spec.containers", f"one must have the name {pytorchjob.CONTAINER}"


def _of_elastic(spec: Mapping[str, Any], replicas: Mapping[str, Any]) -> Iterator[Problem]:
    elastic = spec["elasticPolicy"]
    count = int((replicas.get("Worker") or {}).get("replicas") or 1)
    low, high = elastic.get("minReplicas", count), elastic.get("maxReplicas", count)
    if "Worker" not in replicas:
        yield "spec.elasticPolicy", "needs Worker replicas"
    if not low <= count <= high:
        yield "spec.elasticPolicy.minReplicas", f"{low} to {high} nodes do not hold the {count} that there are"
    if elastic.get("rdzvBackend", "c10d") not in _BACKENDS:
        yield (
            "spec.elasticPolicy.rdzvBackend",
            f"must be one of {', '.join(_BACKENDS)} (given {elastic['rdzvBackend']!r})",
        )
    if "nProcPerNode" in elastic and "nprocPerNode" in spec:
        yield "spec.elasticPolicy.nProcPerNode", "must not stand beside spec.nprocPerNode"


def of_job(obj: Mapping[str, Any], path: str = "spec") -> Iterator[Problem]:
    """A batch Job, or the part of a TrainingRuntime that is one; `path` is where it stands."""
    spec = obj.get("spec") or {}
    restarts = ((spec.get("template") or {}).get("spec") or {}).get("restartPolicy")
    if restarts not in ("Never", "OnFailure"):
        yield f"{path}.template.spec.restartPolicy", f"must be Never or OnFailure (given {restarts!r})"
    if spec.get("podFailurePolicy") and restarts != "Never":
        yield f"{path}.podFailurePolicy", "needs restartPolicy Never"
    yield from _of_ttl(spec, path)
    if int(spec.get("backoffLimit", 0)) < 0:
        yield f"{path}.backoffLimit", "must not be below 0"


def of_runtime(obj: Mapping[str, Any]) -> Iterator[Problem]:
    """A TrainingRuntime: the Job that trains, and its container, by the names that the trainer looks for."""
    path = "spec.template.spec.replicatedJobs"
    rows = (((obj.get("spec") or {}).get("template") or {}).get("spec") or {}).get("replicatedJobs") or []
    if trainjob.REPLICATED_JOB not in [row.get("name") for row in rows]:
        yield path, f"one must have the name {trainjob.REPLICATED_JOB}"
    for row in rows:
        work = row.get("template") or {}
        yield from of_job(work, f"{path}.{row.get('name')}.template.spec")
        if row.get("replicas", 1) != 1:
            yield f"{path}.{row.get('name')}.replicas", f"must be 1 (given {row['replicas']})"
        containers = [each.get("name") for pod in pod_specs(work) for each in pod["containers"]]
        if row.get("name") == trainjob.REPLICATED_JOB and trainjob.CONTAINER not in containers:
            yield f"{path}.{row.get('name')}.template", f"a container must have the name {trainjob.CONTAINER}"


def of_trainjob(obj: Mapping[str, Any]) -> Iterator[Problem]:
    """A TrainJob."""
    spec = obj.get("spec") or {}
    if not (spec.get("runtimeRef") or {}).get("name"):
        yield "spec.runtimeRef.name", "must be given"
    trainer = spec.get("trainer") or {}
    for name in ("numNodes", "numProcPerNode"):
        if trainer.get(name, 1) < 1:
            yield f"spec.trainer.{name}", f"must be at least 1 (given {trainer[name]})"
