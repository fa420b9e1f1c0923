"""A job as a TrainJob (trainer.kubeflow.org/v1alpha1), for Kubeflow Trainer 2.3, with the TrainingRuntime that it refers to.

The runtime holds the pod; it is our own, because upstream's `torch-distributed` names an image of its own and passes
neither volumes nor rights. A TrainJob has no time to live: whoever starts it removes it.
"""

from __future__ import annotations

from typing import Any

from components.launch import batchjob, names, pods
from components.launch.spec import JobSpec, check_processes, digest

CONTAINER = REPLICATED_JOB = "node"  # the names that the trainer looks for
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def trainjob(spec: JobSpec) -> list[dict[str, Any]]:
    """The TrainingRuntime and the TrainJob, of the same name, in the order in which they are to be made.

    Raises:
        ConfigError: more processes than accelerators.
    """
    check_processes(spec)
    trainer: dict[str, Any] = {
        "numNodes": spec.nodes,
        "numProcPerNode": spec.processes,
        "image": spec.image,
        "command": [pods.escaped(word) for word in spec.command],
        "args": [pods.escaped(word) for word in spec.args],
    }
    body: dict[str, Any] = {"runtimeRef": {"kind": "TrainingRuntime", "name": spec.name}, "trainer": trainer}
    if spec.deadline_s is not None:
        body["activeDeadlineSeconds"] = spec.deadline_s
    runs = runtime(spec)
    made = pods.finished({"apiVersion": runs["apiVersion"], "kind": "TrainJob", "spec": body}, spec)
    # What it runs stands in the runtime: a TrainJob with another runtime is another one.
    made["metadata"]["annotations"][names.SPEC_ANNOTATION] = digest({"spec": [body, runs["spec"]]})
    return [runs, made]


def runtime(spec: JobSpec) -> dict[str, Any]:
    """The TrainingRuntime: a Job of as many pods as there are nodes, each of which is replaced when it is lost."""
    rank = pods.from_label(pods.NODE_RANK_ENV, INDEX_LABEL)
    pod = batchjob.template(spec, CONTAINER, [rank])
    policy = batchjob.failure_policy(CONTAINER)
    work = {"backoffLimit": spec.restarts, "podFailurePolicy": policy, "template": pod}
    replicated = {
        "name": REPLICATED_JOB,
        "template": {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, "spec": work},
    }
    body: dict[str, Any] = {
        "mlPolicy": {"numNodes": spec.nodes, "torch": {}},
        "template": {"spec": {"replicatedJobs": [replicated]}},
    }
    if spec.scheduler == "volcano":
        body["podGroupPolicy"] = {"volcano": {}}
        body["template"]["metadata"] = {"annotations": {"scheduling.volcano.sh/queue-name": spec.queue}}
    obj = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainingRuntime", "spec": body}
    made = pods.finished(obj, spec)
    made["metadata"]["labels"].pop(pods.QUEUE_LABEL, None)
    return made
