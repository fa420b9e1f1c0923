"""What Katib says of a search: its conditions, its trials, and the best of them, from plain objects of the API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.launch import experiment, observe
from trainer.config.stages import Tune
from trainer.tune.search import Search, Trial, best_of

# The condition with which a trial has ended -> the state that the local search gives such a trial.
ENDS = {
    "Succeeded": "complete",
    "EarlyStopped": "pruned",
    "MetricsUnavailable": "failed",
    "Killed": "failed",
    "Failed": "failed",
}
# Labels that name a pod's trial, whatever the kind of its job.
_TRIAL_LABELS = (
    "katib.kubeflow.org/trial", "training.kubeflow.org/job-name", "jobset.sigs.k8s.io/jobset-name",
    "batch.kubernetes.io/job-name", "job-name",
)  # fmt: skip
TRIAL_SELECTOR = "katib.kubeflow.org/experiment={}"


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.

    Attributes:
        name: Katib's.
        state: complete, pruned or failed.
        value: of the metric; None without one.
        values: dotted key -> value.
        reason: why it failed.
        began: seconds since 1970.
        seconds: how long it took.
    """

    name: str
    state: str
    value: float | None
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    began: float = 0.0
    seconds: float = 0.0


def trial_of(pod: Mapping[str, Any]) -> str:
    """Name of the trial that a pod belongs to; empty for none."""
    labels = pod["metadata"].get("labels") or {}
    return next((str(labels[key]) for key in _TRIAL_LABELS if labels.get(key)), "")


def read(obj: Mapping[str, Any], tune: Tune) -> Ended | None:
    """A trial that has ended; None while it goes on."""
    status = obj.get("status") or {}
    true = {each["type"]: each for each in status.get("conditions") or [] if each.get("status") == "True"}
    name = next((name for name in ENDS if name in true), "")
    if not name:
        return None
    value, state = value_of(status.get("observation"), tune), ENDS[name]
    reason = ""
    if state == "complete" and value is None:
        state, name = "failed", "MetricsUnavailable"
    if name == "MetricsUnavailable":
        reason = f"MetricsUnavailable: it printed no line {tune.metric}=VALUE"
    elif state == "failed":
        reason = f"{name}: {true[name].get('message') or true[name].get('reason') or ''}".rstrip(": ")
    began = observe.seconds(status.get("startTime"))
    end = observe.seconds(status.get("completionTime")) or observe.seconds(true.get(name, {}).get("lastTransitionTime"))
    assigned = experiment.assigned(tune, (obj.get("spec") or {}).get("parameterAssignments") or [])
    kept = value if state == "complete" else None
    return Ended(obj["metadata"]["name"], state, kept, assigned, reason, began, max(end - began, 0.0) if began else 0.0)


def value_of(observation: Mapping[str, Any] | None, tune: Tune) -> float | None:
    """The value of the metric in a trial's observation: its best one, as the local search takes it."""
    strategy = "max" if tune.direction == "maximize" else "min"
    for metric in (observation or {}).get("metrics") or []:
        if metric.get("name") == tune.metric:
            try:
                return float(metric.get(strategy, ""))
            except ValueError:
                return None
    return None


def found(ended: Iterable[Ended], tune: Tune) -> Search:
    """The search as the local one would tell it: trials in the order in which they began.

    Raises:
        MillraceError: no trial has a score; with the reasons.
    """
    ordered = sorted(ended, key=lambda each: (each.began, each.name))
    trials = [
        Trial(number, each.state, each.value, each.values, each.reason, each.seconds)
        for number, each in enumerate(ordered)
    ]
    return Search(trials, best_of(trials, tune.direction), {})


def disagreement(obj: Mapping[str, Any], search: Search, tune: Tune) -> str:
    """A sentence if what Katib calls the best is not the best of the trials' own metrics; else empty."""
    optimal = (obj.get("status") or {}).get("currentOptimalTrial") or {}
    value = value_of(optimal.get("observation"), tune)
    if value == search.best.value:
        return ""
    name = optimal.get("bestTrialName") or "no trial"
    return f"Katib names {name} with {tune.metric}={value}, but the best of the trials' own is {search.best.value}"


def suggestion_problem(obj: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]]) -> str:
    """Why the service that suggests values does not run; empty if nothing says that it does not."""
    if obj is None:
        return ""
    conditions = (obj.get("status") or {}).get("conditions") or []
    ready = next((each for each in conditions if each.get("type") == "DeploymentReady"), None)
    if ready is None or ready.get("status") == "True":
        return ""
    name = obj["metadata"]["name"]
    own = [each for each in events if str((each.get("involvedObject") or {}).get("name", "")).startswith(f"{name}-")]
    refused = observe.refusal(own)
    if refused:
        return f"the pod that suggests values is refused: {refused.message}"
    return f"the pod that suggests values is not ready: {ready.get('message') or ready.get('reason')}"
