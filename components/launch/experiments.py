"""Run a search as an Experiment of Katib, to the artifact `tuning` that the local search would leave.

Katib removes the job of a trial as soon as it has ended, so the logs of those that fail are read at once. What counts is
what the trials measured: the best of them is taken from their own metrics, not from Katib's word.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.launch import experiment, judge, logs, names, observe, spec, submit, trials, validate
from components.launch.api import Api, ApiError, Object
from components.launch.asked import INPUTS_ANNOTATION, Asked, inputs_value, name_of, small_files
from components.launch.feed import Feed
from components.launch.judge import PATIENCE_S, STUCK, Verdict
from components.launch.launcher import Outcome, guarded
from components.launch.logs import Out
from components.launch.observe import Pod
from components.launch.spec import PARAMS_ENV, JobSpec
from components.launch.trials import Ended
from components.launch.watch import Change
from trainer import storage
from trainer.artifacts import manifest
from trainer.artifacts.publish import building
from trainer.config import Params
from trainer.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MillraceError
from trainer.record import Clock, make_record
from trainer.stage import STAGES
from trainer.tune import written
from trainer.tune.search import Search

# Where Katib's collector of metrics prints what the trial's own container wrote, each line after klog's head.
COLLECTOR = "metrics-logger-and-collector"
_KLOG = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+\s+\d+ [^\]]+\] ")
_TICK_S = 1.0
_REPEAT_S = 300.0
_MAX_TAILS = 8


def run(api: Api, asked: Asked, digests: Mapping[str, str], *, out: Out, detach: bool = False) -> Outcome:
    """Search as `asked` says, and write the artifact; without a search (tune.enabled is false) it says so.

    Args:
        api: the API server.
        asked: stage tune.
        digests: of its inputs.
        out: takes each line.
        detach: leave the Experiment running when a signal ends the launcher.

    Raises:
        ConfigError: Katib cannot make this search, or the cluster would refuse it.
        Stopped: a signal came.
    """
    clock, tune = Clock(), asked.params.tune
    if not tune.enabled or not tune.space:
        out("tune: off, train takes the parameters as they are")
        publish(asked, None, clock)
        return Outcome("tune", True)
    restricted = submit.enforces_restricted(api)
    job, objects = rendered(asked, api.namespace, digests, restricted=restricted)
    validate.check_apart(objects, restricted=restricted)
    if note := experiment.no_early_stopping(tune, restricted):
        out(note)
    outcome, found = search(api, job, asked.params, objects, out=out, detach=detach)
    if found:
        publish(asked, found, clock)
    return outcome


def rendered(
    asked: Asked, namespace: str, digests: Mapping[str, str], *, restricted: bool = True
) -> tuple[JobSpec, list[Object]]:
    """What a search asks for, and its objects, the Experiment last."""
    words = ["trial", "--params", f"env:{PARAMS_ENV}", "--in", f"dataset={asked.inputs['dataset']}"]
    given: dict[str, Any] = {
        "name": name_of(asked), "namespace": namespace, "args": words, "owner": asked.owner, "run": asked.run,
        "gpus": asked.gpus, "nodes": asked.nodes,
    }  # fmt: skip
    objects = experiment.experiment(asked.params, **given, restricted=restricted)
    # So that the Experiment of another dataset is told apart: it is a part of what the digest covers.
    made = objects[-1]
    annotations = made["spec"]["trialTemplate"]["trialSpec"]["metadata"].setdefault("annotations", {})
    annotations[INPUTS_ANNOTATION] = inputs_value(digests)
    made["metadata"]["annotations"][names.SPEC_ANNOTATION] = spec.digest(made)
    job = spec.stage(asked.params, "tune", **given | {"nodes": 1})
    return replace(job, restarts=asked.params.cluster.job.restarts), objects


def search(
    api: Api, job: JobSpec, params: Params, objects: Sequence[Object], *, out: Out, detach: bool = False
) -> tuple[Outcome, Search | None]:
    """Make the Experiment, or attach to it, and wait for its end; the search is None if it failed.

    Args:
        api: the API server.
        job: name, namespace and deadlines.
        params: the configuration.
        objects: what `rendered` made.
        out: takes each line.
        detach: leave the Experiment running when a signal ends the launcher.

    Raises:
        Stopped: a signal came.
    """
    with guarded(api, job, objects, out, detach=detach) as held:
        start = submit.attach(api, job, objects, out)
        held.uid = start["metadata"]["uid"]
        began = observe.seconds(start["metadata"].get("creationTimestamp"))
        with _Watch(api, job, params, start, out) as watch:
            verdict = watch.wait()
        found: Search | None = None
        if verdict.state == "succeeded":
            try:
                found = trials.found(watch.ended.values(), params.tune)
            except MillraceError as error:
                verdict = Verdict("failed", "NoScore", error.message, error.hint, error.exit_code)
            else:
                if problem := trials.disagreement(watch.experiment or {}, found, params.tune):
                    out(f"{job.name}: {problem}; the latter counts")
        if verdict.state == "failed" and any(pod.living for pod in watch.pods.values()):
            try:
                submit.remove(api, job, objects, uid=held.uid, out=out)
            except ApiError as error:  # why it failed is what people need to know
                out(f"{job.name}: not removed: {error.message}")
    ran = max(api.now() - (watch.began_at or api.now()), 0.0)
    waited = max((watch.began_at or api.now()) - began, 0.0)
    message = f"tune: {verdict.message}" if verdict.message else ""
    out(
        f"{job.name}: {'succeeded' if found else f'failed ({verdict.reason})'}: {len(watch.ended)} trials in {ran:.0f} s"
    )
    if found:
        shown = " ".join(f"{key}={value}" for key, value in found.best.params.items())
        out(f"tune: best of {len(found.trials)} trials {params.tune.metric}={found.best.value:g} {shown}")
    outcome = Outcome(
        job.name, found is not None, verdict.reason, message, verdict.hint, verdict.exit_code, 0, waited, ran
    )
    return outcome, found


def publish(asked: Asked, found: Search | None, clock: Clock) -> None:
    """Write the artifact `tuning` as the stage would, with the record of how it was made, to its URI."""
    uri = asked.outputs["tuning"]
    with tempfile.TemporaryDirectory(prefix="millrace-") as temporary:
        inputs = {
            port: manifest.read(small_files(place, Path(temporary) / port), verify=False)
            for port, place in asked.inputs.items()
        }
        target = Path(temporary) / "tuning" if storage.is_remote(uri) else storage.local_path(uri)
        tree = asked.params.model_dump(mode="json")
        sections = {section: tree[section] for section in STAGES["tune"].sections}
        metrics = written.metrics_of(asked.params, found) if found else {}
        with building(target) as folder:
            written.write(folder, asked.params, found)
            record = make_record("tune", clock, sections, inputs, metrics)
            meta = written.meta_of(asked.params, found)["tuning"]
            manifest.seal(folder, STAGES["tune"].outputs["tuning"].kind, meta, record, written.VOLATILE)
        if storage.is_remote(uri):
            storage.send(target, uri)


@dataclass
class _Watch:
    """One Experiment, its Suggestion, its trials and their pods, as they change. A context manager."""

    api: Api
    job: JobSpec
    params: Params
    experiment: Object | None
    out: Out
    ended: dict[str, Ended] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    began_at: float = 0.0

    def __post_init__(self) -> None:
        name = self.job.name
        asked: list[tuple[str, dict[str, Any]]] = [
            ("Experiment", {"field_selector": f"metadata.name={name}"}),
            ("Suggestion", {"field_selector": f"metadata.name={name}"}),
            ("Trial", {"label_selector": trials.TRIAL_SELECTOR.format(name)}),
            ("Pod", {"label_selector": submit.selector(name)}),
        ]
        self._feed = Feed(self.api, asked, self.job.namespace, self.out, name)
        self._suggestion: Object | None = None
        self._tails: dict[str, list[str]] = {}
        self._codes: dict[str, int] = {}
        self._stuck: dict[str, float] = {}
        self._uids: dict[tuple[str, str], dict[str, int]] = {}
        self._waiting_since = self.api.now()
        self._told = ("", 0.0)
        self._told_ended = -1
        self._asked_at = 0.0
        self._events: list[Object] = []

    def __enter__(self) -> _Watch:
        self._feed.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.__exit__()

    def wait(self) -> Verdict:
        """Watch until the search is over."""
        handlers: dict[str, Callable[[Change], None]] = {
            "Experiment": self._see_experiment, "Suggestion": self._see_suggestion, "Trial": self._see_trial,
            "Pod": self._see_pod,
        }  # fmt: skip
        while True:
            for change in self._feed.take(_TICK_S):
                handlers[change.kind](change)
            if self._feed.current:
                verdict = self._judged(self.api.now())
                if verdict.over:
                    self._see_all_trials()
                    verdict = self._judged(self.api.now())
                if verdict.over:
                    return verdict
                self._tell(verdict.message)

    def _see_all_trials(self) -> None:
        """The trials as they stand now: the end of the last one may come after that of the Experiment, by another watch."""
        selector = trials.TRIAL_SELECTOR.format(self.job.name)
        for each in self.api.list(
            "Trial", label_selector=selector, namespace=self.job.namespace, within_s=submit.API_S
        ):
            self._see_trial(Change("Trial", "MODIFIED", each))

    def _see_experiment(self, change: Change) -> None:
        self.experiment = None if change.type == "DELETED" else change.object

    def _see_suggestion(self, change: Change) -> None:
        self._suggestion = None if change.type == "DELETED" else change.object

    def _see_trial(self, change: Change) -> None:
        name, tune = change.object["metadata"]["name"], self.params.tune
        if change.type == "DELETED" or name in self.ended:
            return
        found = trials.read(change.object, tune)
        if found is None:
            return
        told = logs.trainer_error(self._tails.get(name, []))
        if told and found.state == "failed":
            found = replace(found, reason=told.message)
        self.ended[name] = found
        values = " ".join(f"{key}={value}" for key, value in found.values.items())
        score = f"{tune.metric}={found.value:g}" if found.value is not None else found.reason
        self.out(f"trial {len(self.ended)}/{self._total()} {found.state}: {score} {values}".rstrip())

    def _total(self) -> int:
        return int(((self.experiment or {}).get("spec") or {}).get("maxTrialCount") or self.params.tune.trials)

    def _see_pod(self, change: Change) -> None:
        pod, trial = observe.read_pod(change.object), trials.trial_of(change.object)
        if change.type == "DELETED":
            self.pods.pop(pod.name, None)
            self._stuck.pop(pod.name, None)
        else:
            self.pods[pod.name] = pod
            if pod.waiting in STUCK:
                self._stuck.setdefault(pod.name, self.api.now())
            else:
                self._stuck.pop(pod.name, None)
        if pod.begun:  # a launcher that attaches goes on with the clock of the one before it
            began = min(pod.started or self.api.now(), self.api.now())
            self.began_at = min(self.began_at or began, began)
        self._uids.setdefault((trial, pod.rank), {})[pod.uid] = pod.restarts
        if pod.exit and pod.exit.code and trial not in self._tails and len(self._tails) < _MAX_TAILS:
            self._tails[trial] = self._ending(change.object, pod)
            self._codes[trial] = pod.exit.code
            for line in logs.shown(trial, self._tails[trial][-logs.TAIL :]):
                self.out(line)

    def _ending(self, obj: Object, pod: Pod) -> list[str]:
        """The last lines of a trial; Katib sends those of the first pod of each through its collector."""
        collected = any(each.get("name") == COLLECTOR for each in obj["spec"].get("containers") or [])
        lines = logs.ending(
            self.api, pod.name, COLLECTOR if collected else pod.container, pod.restarts > 0, self.job.namespace
        )
        return [_KLOG.sub("", line) for line in lines]

    def _judged(self, now: float) -> Verdict:
        if self.experiment is None:
            return Verdict("failed", "Deleted", f"{self.job.name} was deleted by somebody else", "start it again", 1)
        state, condition = observe.condition(self.experiment)
        if state == "succeeded":
            return Verdict("succeeded")
        if state == "failed":
            return self._failed(condition)
        waits = not any(pod.begun and pod.living for pod in self.pods.values())
        # A trial that has ended, and the next one that is not there yet, is no waiting for a place.
        if not waits or len(self.ended) != self._told_ended:
            self._waiting_since, self._told_ended = now, len(self.ended)
        if found := self._stuck_pod(now) or self._too_many_restarts():
            return found
        limit = self.job.run_timeout_s
        if limit and self.began_at and now - self.began_at > limit:
            message = f"it ran for {limit:g} s (cluster.job.run_timeout_s), and was not done"
            return Verdict("failed", "DeadlineExceeded", message, "raise cluster.job.run_timeout_s", EXIT_FAILURE)
        if not waits:
            return Verdict("running", message=f"{len(self.ended)} of {self._total()} trials done")
        reason, message = self._why_waiting()
        if now - self._waiting_since <= self.job.queue_timeout_s:
            return Verdict("waiting", reason, message)
        late = f"no trial ran for {self.job.queue_timeout_s:g} s (cluster.job.queue_timeout_s)"
        return Verdict("failed", reason, f"{late}: {message}", judge.WAIT_HINT, EXIT_FAILURE)

    def _stuck_pod(self, now: float) -> Verdict | None:
        for name, since in self._stuck.items():
            if now - since >= PATIENCE_S:
                return judge.stuck_verdict(self.pods[name])
        return None

    def _too_many_restarts(self) -> Verdict | None:
        for (trial, rank), uids in self._uids.items():
            again = len(uids) - 1 + sum(uids.values())
            if again > self.job.restarts:
                message = f"trial {trial}: {rank} failed or was lost {again} times (cluster.job.restarts)"
                return Verdict("failed", "TooManyRestarts", message, "see its log above", EXIT_FAILURE)
        return None

    def _why_waiting(self) -> tuple[str, str]:
        told = next((pod for pod in self.pods.values() if pod.waiting and not pod.begun), None)
        if told:
            return told.waiting, f"{told.name}: {told.waiting}: {told.detail}"
        if not self.pods and not self.ended:
            problem = trials.suggestion_problem(self._suggestion, self._refusals())
            if problem:
                return "SuggestionNotReady", problem
            if not (self.experiment or {}).get("status"):
                return "NoOperator", "Katib has not taken up the Experiment yet; see millrace doctor --cluster"
        refused = observe.refusal(each for each in self._refusals() if self._is_of_trial(each))
        if refused:
            return "FailedCreate", f"pods of its trials are refused: {refused.message}"
        return "Pending", f"{len(self.ended)} of {self._total()} trials done, none runs"

    def _is_of_trial(self, event: Object) -> bool:
        return str((event.get("involvedObject") or {}).get("name", "")).startswith(f"{self.job.name}-")

    def _refusals(self) -> list[Object]:
        """Events of pods that were refused: those of the Suggestion's and the trials' controllers bear other names."""
        if self.api.now() - self._asked_at > 5.0:
            self._asked_at = self.api.now()
            self._events = []
            for reason in observe.REFUSALS:
                try:
                    self._events += self.api.list(
                        "Event", field_selector=f"reason={reason}", namespace=self.job.namespace, within_s=5.0
                    )
                except ApiError:
                    continue
        return self._events

    def _failed(self, condition: Mapping[str, Any]) -> Verdict:
        """The failure of the Experiment, by what its trials said."""
        said = str(condition.get("message") or condition.get("reason") or "it failed")
        reasons: dict[str, list[str]] = {}
        for name, trial in self.ended.items():
            if trial.state == "failed":
                reasons.setdefault(trial.reason, []).append(name)
        lines = [f"{', '.join(found)}: {reason}" for reason, found in reasons.items()]
        hints = [told.hint for lines_ in self._tails.values() if (told := logs.trainer_error(lines_)) and told.hint]
        codes = set(self._codes.values())
        code = codes.pop() if len(codes) == 1 else EXIT_FAILURE
        hint = hints[-1] if hints else "correct what the reasons name; cluster.job.failed_trials allows so many to fail"
        reason = "MetricsUnavailable" if any("MetricsUnavailable" in each for each in reasons) else "TrialsFailed"
        permanent = code if 0 < code < 128 else EXIT_FAILURE
        return Verdict("failed", reason, "\n  ".join([said, *lines]), hint, permanent if reasons else EXIT_BAD_INPUT)

    def _tell(self, text: str) -> None:
        now = self.api.now()
        if text and (text != self._told[0] or now - self._told[1] > _REPEAT_S):
            self.out(f"{self.job.name}: {text}")
            self._told = (text, now)
