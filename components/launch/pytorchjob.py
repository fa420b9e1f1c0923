"""A job as a PyTorchJob (kubeflow.org/v1), for the Kubeflow training operator 1.9."""

from __future__ import annotations

from typing import Any

from components.launch import pods
from components.launch.spec import JobSpec, check_processes

CONTAINER = "pytorch"
INDEX_LABEL = "training.kubeflow.org/replica-index"


def pytorchjob(spec: JobSpec) -> dict[str, Any]:
    """The PyTorchJob. Its workers are equals under an elasticPolicy: the operator gives none an init container, which the
    policy "restricted" would refuse, and a worker that is lost is put in place again while the others wait for it.

    `ExitCode` has the operator itself replace a pod that ended with 128 or more, or was deleted, at once: the kubelet's
    own restarts (`OnFailure`) wait up to five minutes between them.

    Raises:
        ConfigError: more processes than accelerators.
    """
    check_processes(spec)
    body: dict[str, Any] = {
        "nprocPerNode": str(spec.processes),
        "runPolicy": _run_policy(spec),
    }
    if not spec.master:
        body["elasticPolicy"] = {
            "minReplicas": spec.nodes,
            "maxReplicas": spec.nodes,
            "rdzvBackend": "c10d",
            "maxRestarts": spec.restarts,
        }
    body["pytorchReplicaSpecs"] = _replicas(spec)
    return pods.finished({"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "spec": body}, spec)


def _run_policy(spec: JobSpec) -> dict[str, Any]:
    # None: pods of a job that ended stay until their logs have been read; the launcher removes what still runs.
    policy: dict[str, Any] = {"cleanPodPolicy": "None"}
    if spec.ttl_s is not None:
        policy["ttlSecondsAfterFinished"] = spec.ttl_s
    if spec.deadline_s is not None:
        policy["activeDeadlineSeconds"] = spec.deadline_s
    if spec.scheduler == "volcano":
        gang: dict[str, Any] = {"queue": spec.queue, "minAvailable": spec.nodes}
        policy["schedulingPolicy"] = gang | ({"priorityClass": spec.priority_class} if spec.priority_class else {})
    return policy


def _replicas(spec: JobSpec) -> dict[str, Any]:
    if not spec.master:
        rank = pods.from_label(pods.NODE_RANK_ENV, INDEX_LABEL)
        return {"Worker": _replica(spec, spec.nodes, [rank])}
    # With a master, the operator tells each pod its rank: PET_NODE_RANK.
    return {"Master": _replica(spec, 1)} | ({"Worker": _replica(spec, spec.nodes - 1)} if spec.nodes > 1 else {})


def _replica(spec: JobSpec, count: int, env: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "replicas": count,
        "restartPolicy": "ExitCode",
        "template": pods.pod_template(spec, CONTAINER, env),
    }
