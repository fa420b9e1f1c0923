"""The last task of a pipeline run whose training or search are jobs of the cluster: what still runs of them is deleted.

python -m components.launch finish --executor-input '{{$}}'

Kubeflow gives a step that is cancelled 0.6 s, so what it started may live on. Jobs that have ended are kept for their logs,
as long as cluster.job.ttl_s says and the run's own pods are there. Then `trainer.finish` does its part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from components.launch import names, observe, submit
from components.launch.api import Api, ApiError, Object
from trainer import executor, finish, log
from trainer.errors import MillraceError

# The Experiment before the jobs of its trials, which it would put in place again.
KINDS = ("Experiment", "PyTorchJob", "TrainJob", "Job")
_API_S = 60.0
# cluster.job.grace_s and the kubelet's part in the end of a pod; what takes longer goes on without us.
_GONE_S = 120.0
_POLL_S = 1.0


def run(text: str, overrides: Sequence[str] = ()) -> int:
    """Clean up and notify as an ExecutorInput says; returns the exit status: 0 even if nothing can be reached."""
    identity = str(executor.read(text).values.get("run_id") or "")
    if identity:
        try:
            sweep(Api.connect(), identity)
        except MillraceError as error:  # a run that is done stays so, and people are told
            log.say(f"finish: what was launched was not all looked after: {error}")
    return finish.run(text, overrides)


def sweep(api: Api, identity: str, *, ended: bool = False) -> list[str]:
    """Delete the jobs of a run that have not ended, and wait until they are gone, so that nothing writes to the store any more.

    Args:
        api: the API server.
        identity: id of the run.
        ended: delete those that have ended, too.

    Returns:
        `KIND NAME` of each.

    Raises:
        ApiError: the API server does not answer.
    """
    removed: dict[tuple[str, str], str] = {}
    for kind in KINDS:
        try:
            for each in _found(api, kind, identity):
                over = observe.condition(each)[0] in ("succeeded", "failed")
                if over and not ended and kind == "PyTorchJob":
                    _end_pods(api, each["metadata"]["name"])
                if ended or not over:
                    name, uid = each["metadata"]["name"], each["metadata"]["uid"]
                    api.delete(kind, name, propagation="Foreground", uid=uid, within_s=_API_S)
                    removed[kind, name] = uid
                    log.say(f"finish: {kind} {name}: {'had ended' if over else 'had not ended'}, and was removed")
                    if kind in ("Experiment", "TrainJob"):
                        api.delete("TrainingRuntime", name, within_s=_API_S)
        except ApiError as error:
            if not error.status:  # nobody answers
                raise
            log.say(f"finish: {kind}s of this run were not removed: {error.message}")
    _wait(api, identity, removed)
    return [" ".join(each) for each in removed]


def _end_pods(api: Api, name: str) -> None:
    """Delete the pods of a job that has ended without them: the operator lets them run, and hold their accelerators."""
    for pod in api.list("Pod", label_selector=submit.selector(name), within_s=_API_S):
        if observe.read_pod(pod).living:
            api.delete("Pod", pod["metadata"]["name"], uid=pod["metadata"]["uid"], within_s=_API_S)
            log.say(f"finish: pod {pod['metadata']['name']}: ran on after its job had ended, and was removed")


def _found(api: Api, kind: str, identity: str) -> list[Object]:
    """The objects of a kind that a run has launched; none where the cluster lacks the kind."""
    selector = f"{names.RUN_LABEL}={names.label_value(identity)}"
    try:
        return api.list(kind, label_selector=selector, within_s=_API_S)
    except ApiError as error:
        if error.status != 404:
            raise
        return []


def _wait(api: Api, identity: str, removed: dict[tuple[str, str], str]) -> None:
    end = time.monotonic() + _GONE_S
    for (kind, name), uid in removed.items():
        while uid in [each["metadata"]["uid"] for each in _found(api, kind, identity)]:
            if time.monotonic() > end:
                log.say(f"finish: {kind} {name}: its pods have not ended yet")
                return
            time.sleep(_POLL_S)
