"""What the cluster says of a job, reduced to what a judgement needs: conditions, pods and refusals to make pods.

The operators, the kubelet and the scheduler each tell their part elsewhere: the job's conditions, the containers' states,
a pod's conditions, events. Everything here is read from plain objects of the API; nothing is asked of the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

State = Literal["succeeded", "failed", "suspended", ""]

# Conditions by which controllers say how a job stands, the decisive ones first. The same table serves the batch Job,
# the PyTorchJob, the TrainJob and Katib's Experiment; their other conditions (Created, Running, Restarting) decide nothing:
# a job stays Running while its pods crash.
CONDITIONS: dict[str, State] = {
    "Failed": "failed",
    "Succeeded": "succeeded",
    "Complete": "succeeded",
    "Suspended": "suspended",
}

# The containers that run our image, by kind of job; other containers of a pod were injected by somebody else.
MAIN = ("pytorch", "node", "main")

_TYPE = "training.kubeflow.org/replica-type"
_INDEX = ("training.kubeflow.org/replica-index", "batch.kubernetes.io/job-completion-index")
# Reasons of the events by which a controller says that it may not make a pod.
REFUSALS = ("FailedCreatePod", "FailedCreate")


@dataclass(frozen=True)
class Exit:
    """How a container ended: exit code, the kubelet's reason (OOMKilled, Error, ...) and when, in seconds since 1970."""

    code: int
    reason: str
    at: float


@dataclass(frozen=True)
class Pod:
    """A pod of a job, in short.

    Attributes:
        rank: what people call it, the same for the pod that replaces it: worker-0, master-0, node-0.
        index: its number among those of its kind.
        container: name of the container that runs the stage.
        created: when, in seconds since 1970.
        phase: Pending, Running, Succeeded or Failed.
        reason: the pod's own: Evicted, Shutdown, ...
        waiting: why a container does not run: ImagePullBackOff, CrashLoopBackOff, ...; empty if none waits.
        detail: the kubelet's or the scheduler's own words on it.
        started: when its container last started; 0 if it never did.
        running: whether its container runs now.
        restarts: how often the kubelet started its container again.
        exit: how its container ended, the last time.
        deleted: whether somebody has asked for its end.
    """

    name: str
    uid: str
    rank: str
    index: int
    container: str
    image: str
    node: str
    created: float
    phase: str
    reason: str
    waiting: str
    detail: str
    started: float
    running: bool
    restarts: int
    exit: Exit | None
    deleted: bool

    @property
    def begun(self) -> bool:
        """Whether its container runs, or has run."""
        return self.started > 0 or self.exit is not None or self.phase in ("Succeeded", "Failed")

    @property
    def succeeded(self) -> bool:
        """Whether its container ended with 0."""
        return self.phase == "Succeeded" or (self.exit is not None and self.exit.code == 0 and not self.running)

    @property
    def living(self) -> bool:
        """Whether it holds, or will hold, a place on a node."""
        return self.phase not in ("Succeeded", "Failed")


def seconds(text: str | None) -> float:
    """A time of the API in seconds since 1970; 0 for none."""
    if not text:
        return 0.0
    try:
        return datetime.fromisoformat(text).astimezone(UTC).timestamp()
    except ValueError:
        return 0.0


def condition(job: Mapping[str, Any]) -> tuple[State, Mapping[str, Any]]:
    """How a job stands by its own conditions, and the condition that says so."""
    found = {
        each.get("type"): each
        for each in (job.get("status") or {}).get("conditions") or []
        if each.get("status") == "True"
    }
    for name, state in CONDITIONS.items():
        if name in found:
            return state, found[name]
    return "", {}


def read_pod(obj: Mapping[str, Any]) -> Pod:
    """The short form of a pod."""
    meta, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    containers = spec.get("containers") or [{}]
    main = next((each for each in containers if each.get("name") in MAIN), containers[0])
    states = status.get("containerStatuses") or []
    own: Mapping[str, Any] = next((each for each in states if each.get("name") == main.get("name")), {})
    state, last = own.get("state") or {}, own.get("lastState") or {}
    waiting, detail, image = _waiting([own, *(status.get("initContainerStatuses") or [])])
    if not own:
        waiting, detail = _unscheduled(status.get("conditions") or [])
    running, ended = state.get("running") or {}, state.get("terminated") or last.get("terminated")
    labels = meta.get("labels") or {}
    index = next((int(labels[key]) for key in _INDEX if str(labels.get(key, "")).isdigit()), 0)
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        rank=f"{labels.get(_TYPE, 'node' if _INDEX[1] in labels else 'pod')}-{index}",
        index=index,
        container=str(main.get("name", "")),
        image=image or str(main.get("image", "")),
        node=str(spec.get("nodeName") or ""),
        created=seconds(meta.get("creationTimestamp")),
        phase=str(status.get("phase") or "Pending"),
        reason=str(status.get("reason") or ""),
        waiting=waiting,
        detail=detail or str(status.get("message") or ""),
        started=seconds(running.get("startedAt")) or seconds((ended or {}).get("startedAt")),
        running=bool(running),
        restarts=int(own.get("restartCount") or 0),
        exit=_exit(ended, obj) if ended else None,
        deleted=bool(meta.get("deletionTimestamp")),
    )


def _waiting(states: Iterable[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Reason, message and image of the first container that waits for more than its turn."""
    for each in states:
        waiting = (each.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if reason and reason not in ("ContainerCreating", "PodInitializing"):
            return reason, str(waiting.get("message") or ""), str(each.get("image") or "")
    return "", "", ""


def _unscheduled(conditions: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    for each in conditions:
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            return str(each.get("reason") or "Unschedulable"), str(each.get("message") or "")
    return "", ""


def _exit(ended: Mapping[str, Any], obj: Mapping[str, Any]) -> Exit:
    reason = str(ended.get("reason") or "")
    evicted = str((obj.get("status") or {}).get("reason") or "")
    return Exit(int(ended.get("exitCode") or 0), evicted or reason, seconds(ended.get("finishedAt")))


@dataclass(frozen=True)
class Refusal:
    """A pod that was not allowed to exist: the API server's words, and when it last said them."""

    message: str
    at: float

    @property
    def is_quota(self) -> bool:
        """Whether it may pass by itself, when somebody else's pods end."""
        return "exceeded quota" in self.message


def refusal(events: Iterable[Mapping[str, Any]]) -> Refusal | None:
    """The last refusal to make a pod, from the events of a job and of the objects below it."""
    found = [
        Refusal(str(each.get("message") or each.get("note") or ""), event_time(each))
        for each in events
        if each.get("reason") in REFUSALS
    ]
    return max(found, key=lambda each: each.at, default=None)


def warning(events: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """Reason and message of the last warning, such as FailedMount; empty for none."""
    found = [each for each in events if each.get("type") == "Warning"]
    last = max(found, key=event_time, default={})
    return str(last.get("reason") or ""), str(last.get("message") or last.get("note") or "")


def event_time(event: Mapping[str, Any]) -> float:
    """When an event was last seen, in seconds since 1970."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return max(seconds(each) for each in (*times, event["metadata"].get("creationTimestamp")))
