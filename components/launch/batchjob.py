"""A job of one pod as a Job (batch/v1): stages of the engine `kubernetes`, and trials of an Experiment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from components.launch import pods
from components.launch.spec import JobSpec, check_processes

CONTAINER = "main"


def job(spec: JobSpec) -> dict[str, Any]:
    """The Job. A pod that ended with 1 to 127 fails it at once, as for a PyTorchJob; one that a signal ended, or that was
    deleted, is put in place again, `restarts` times; one that its node evicted does not count.

    Raises:
        ConfigError: training in more processes than accelerators.
    """
    spec = replace(spec, nodes=1)
    if spec.stage == "train":  # others work in one process
        check_processes(spec)
    body: dict[str, Any] = {
        "backoffLimit": spec.restarts,
        "podFailurePolicy": failure_policy(CONTAINER),
    }
    if spec.ttl_s is not None:
        body["ttlSecondsAfterFinished"] = spec.ttl_s
    if spec.deadline_s is not None:
        body["activeDeadlineSeconds"] = spec.deadline_s
    body["template"] = template(spec, CONTAINER)
    return pods.finished({"apiVersion": "batch/v1", "kind": "Job", "spec": body}, spec)


def template(spec: JobSpec, container: str, env: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The pod template of a Job, whose pods the kubelet does not restart: the Job puts others in their place."""
    pod = pods.pod_template(spec, container, env)
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def failure_policy(container: str) -> dict[str, Any]:
    """The podFailurePolicy of a Job: which exit codes of the container are for good."""
    evicted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    codes = {"containerName": container, "operator": "In", "values": list(range(1, 128))}
    return {"rules": [{"action": "FailJob", "onExitCodes": codes}, evicted]}
