"""The local search: Optuna's samplers and pruners over a journal that outlives a kill.

The same seed gives the same trials and the same best, also when the search was killed on the way: the values of a trial
are drawn by a sampler seeded with the trial's number from the finished trials alone, and are written to the journal
in one line before the trial starts; a trial that a dead process left running is run again under its number.
A trial that fails or diverges is FAILED with its reason and never has a score.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import storage
from trainer.config.stages import Tune
from trainer.errors import ArtifactError, DivergedError, MillraceError, Preempted, StorageError
from trainer.log import say
from trainer.tune import space
from trainer.tune.space import Values

if TYPE_CHECKING:
    import optuna

Report = Callable[[int, float], None]
"""report(evaluation, value): tell an intermediate value of the metric; raises optuna.TrialPruned to stop the trial."""
Objective = Callable[[int, Values, Report], float]
"""objective(trial number, values, report) -> the final value of the metric."""

STUDY = "search"
# A trial whose process dies this often without one evaluation in between kills it itself (out of memory, most likely).
MAX_ATTEMPTS = 10


class SearchError(MillraceError):
    """The search as a whole cannot go on; raised inside a trial, it ends the search."""


@dataclass(frozen=True)
class Trial:
    """A finished trial. `state` is complete, pruned or failed; `value` is None unless it is complete."""

    number: int
    state: str
    value: float | None
    params: Values
    reason: str = ""
    seconds: float = 0.0
    evaluations: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """The outcome: all trials by number, the best one, and the share of each dimension in the variance (fANOVA)."""

    trials: list[Trial]
    best: Trial
    importance: dict[str, float]


def search(
    tune: Tune, objective: Objective, scratch: Path, *, first: Values | None = None, evaluations: int = 0
) -> Search:
    """Run the trials that the journal does not hold yet.

    Args:
        tune: the section.
        objective: trains and returns the value of `tune.metric`; an exception makes the trial FAILED.
        scratch: folder of the journal, which no other process writes to meanwhile.
        first: values of the first trial, normally those that are configured; the grid has no use for it.
        evaluations: evaluations of a whole trial, if known: Hyperband's resource.

    Raises:
        MillraceError: all trials failed (DivergedError if all diverged), with their reasons.
        ConfigError: a grid over a continuous dimension.
        Preempted: SIGTERM arrived in a trial; the same call goes on from there.
    """
    limit = min(tune.trials, space.grid_size(tune)) if tune.sampler == "grid" else tune.trials
    started = time.monotonic()
    with _quiet():
        study = _open(tune, scratch)
        while True:
            trials = study.get_trials(deepcopy=False)
            done = [trial for trial in trials if trial.state.is_finished()]
            if len(done) == len(trials):
                late = tune.timeout_s and time.monotonic() - started >= tune.timeout_s
                if len(done) >= limit or (late and done):
                    break
                study.enqueue_trial(_propose(study, tune, first, len(done), evaluations))
            _run_next(study, tune, objective, limit, evaluations)
        finished = [_summary(trial) for trial in study.get_trials(deepcopy=False)]
        return Search(finished, best_of(finished, tune.direction), importance_of(study))


def best_of(trials: list[Trial], direction: str) -> Trial:
    """The complete trial with the best value; the first of equals.

    Raises:
        MillraceError: no trial is complete.
    """
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    if complete:
        sign = -1.0 if direction == "maximize" else 1.0
        return min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number))
    reasons: dict[str, list[int]] = {}
    for trial in trials:
        reasons.setdefault(trial.reason or trial.state, []).append(trial.number)
    lines = [f"trial {', '.join(map(str, numbers))}: {reason}" for reason, numbers in reasons.items()]
    diverged = all(reason.startswith(DivergedError.__name__) for reason in reasons)
    raise (DivergedError if diverged else MillraceError)(
        f"tune: none of the {len(trials)} trials has a score\n  " + "\n  ".join(lines),
        "narrow tune.space (a lower train.lr, most often), or correct what the reasons name",
    )


def importance_of(study: optuna.Study) -> dict[str, float]:
    """Share of each dimension in the variance of the score (fANOVA, Hutter et al. 2014); empty where it has no meaning."""
    import optuna

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
        return {}
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError, ImportError):
        return {}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def make_sampler(tune: Tune, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial, seeded with its number, so that a resumed search draws what it would have drawn."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([tune.seed, number]).generate_state(1)[0])
    # Half of a small budget is spent on looking around, not the ten trials that larger ones can afford.
    startup = max(2, min(10, tune.trials // 2))
    if tune.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if tune.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    if tune.sampler == "grid":
        # The seed orders the grid: it must be the same for all trials.
        axes = {key: space.grid_values(key, dimension) for key, dimension in tune.space.items()}
        return optuna.samplers.GridSampler(axes, seed=tune.seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def make_pruner(tune: Tune, evaluations: int) -> optuna.pruners.BasePruner:
    """The pruner; its resource is the number of evaluations on the validation split."""
    import optuna

    if tune.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=max(2, min(5, tune.trials // 3)), n_warmup_steps=2)
    if tune.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource=evaluations or "auto")
    return optuna.pruners.NopPruner()


def _open(tune: Tune, scratch: Path) -> optuna.Study:
    """The study on its journal, after repairing what a kill left: half a line, and the lock of a dead process."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    with storage.explained(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "journal.jsonl"
    for stale in path.parent.glob(f"{path.name}.lock*"):
        storage.remove(stale)
    if path.exists():
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    return optuna.create_study(
        study_name=STUDY,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        direction=tune.direction,
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def _propose(study: optuna.Study, tune: Tune, first: Values | None, number: int, evaluations: int) -> Values:
    """Values of trial `number`, from the finished trials alone."""
    if number == 0 and first is not None and tune.sampler != "grid":
        return first
    trials = study.get_trials(deepcopy=False)
    failed = bool(trials) and _summary(trials[-1]).state == "failed"
    if tune.sampler == "gp":
        # The GP sees complete trials only: it would propose a pruned or failed point again and again.
        trials = [_as_seen_by_gp(trial) for trial in trials]
        if failed:
            tune = tune.model_copy(update={"sampler": "random"})
    return dict(_memory(trials, tune, number, evaluations).ask(space.distributions(tune)).params)


def _memory(trials: list[Any], tune: Tune, number: int, evaluations: int) -> optuna.Study:
    """A study in memory with these trials: what samplers and pruners note down in it dies with the process."""
    import optuna

    memory = optuna.create_study(
        study_name=STUDY,
        direction=tune.direction,
        sampler=make_sampler(tune, number),
        pruner=make_pruner(tune, evaluations),
    )
    memory.add_trials(trials)
    return memory


def _as_seen_by_gp(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    """A pruned trial as a complete one with its last intermediate value; any other as it is."""
    import optuna

    if trial.state != optuna.trial.TrialState.PRUNED or not trial.intermediate_values:
        return trial
    last = trial.intermediate_values[max(trial.intermediate_values)]
    return optuna.create_trial(params=trial.params, distributions=trial.distributions, value=last)


class _Run:
    """The trial that is run now: durable in the journal, and judged by the pruner in memory.

    The pruner's notes reach the journal when the trial ends. Were they written as they are made, a trial that is run
    again would find the notes of the run that died, and would be judged otherwise.
    """

    def __init__(self, study: optuna.Study, tune: Tune, evaluations: int) -> None:
        import optuna
        from optuna.trial import TrialState

        self.study = study
        trials = study.get_trials(deepcopy=False)
        left = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self.trial = optuna.Trial(study, left[0]._trial_id) if left else study.ask()
        for key, distribution in space.distributions(tune).items():
            self.trial._suggest(key, distribution)
        done = [trial for trial in trials if trial.state.is_finished()]
        memory = _memory(done, tune, self.trial.number, evaluations)
        memory.enqueue_trial(self.trial.params)
        self.judged = memory.ask(space.distributions(tune))
        self.evaluated: list[int] = list(self.trial.user_attrs.get("evaluated", []))
        self.known = dict(left[0].intermediate_values) if left else {}
        attempts = self.trial.user_attrs.get("attempts", {})
        again = attempts.get("after") == len(self.evaluated)
        self.attempts = attempts.get("count", 0) + 1 if again else 1
        self.trial.set_user_attr("attempts", {"count": self.attempts, "after": len(self.evaluated)})

    def replay(self) -> None:
        """Judge what a run that died has reported."""
        for evaluation in sorted(self.known):
            self._judge(evaluation, self.known[evaluation])

    def report(self, step: int, value: float) -> None:
        """Counted and not timed: trials with different batch sizes are compared after the same number of evaluations."""
        if step in self.evaluated:
            return
        self.evaluated.append(step)
        evaluation = len(self.evaluated)
        self.trial.report(value, evaluation)
        self.trial.set_user_attr("evaluated", self.evaluated)
        if evaluation not in self.known:
            self._judge(evaluation, value)

    def _judge(self, evaluation: int, value: float) -> None:
        import optuna

        self.judged.report(value, evaluation)
        if self.judged.should_prune():
            raise optuna.TrialPruned(f"fell behind at evaluation {evaluation}")

    def finish(self, state: str, value: float | None, reason: str, seconds: float) -> None:
        """Write the outcome."""
        from optuna.trial import TrialState

        for key, note in self.judged.storage.get_trial_system_attrs(self.judged._trial_id).items():
            if key != "fixed_params":
                self.study._storage.set_trial_system_attr(self.trial._trial_id, key, note)
        self.trial.set_user_attr("reason", reason)
        self.trial.set_user_attr("seconds", seconds)
        if state == "complete":
            self.study.tell(self.trial, value)
        else:
            self.study.tell(self.trial, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)


def _run_next(study: optuna.Study, tune: Tune, objective: Objective, limit: int, evaluations: int) -> None:
    """Run the trial that is waiting, or the one that a dead process left running."""
    import optuna

    run = _Run(study, tune, evaluations)
    clock = time.perf_counter()
    value: float | None = None
    try:
        if run.attempts > MAX_ATTEMPTS:
            raise RuntimeError(f"its process died {MAX_ATTEMPTS} times in a row (out of memory?)")
        run.replay()
        value = float(objective(run.trial.number, dict(run.trial.params), run.report))
        state = "complete" if math.isfinite(value) else "failed"
        reason = "" if state == "complete" else f"{DivergedError.__name__}: {tune.metric} is not finite"
    except optuna.TrialPruned as pruned:
        state, reason = "pruned", str(pruned)
    except Preempted:
        run.trial.set_user_attr("attempts", {})
        raise
    except (SearchError, StorageError, ArtifactError):
        raise  # the machine or the data, not the values
    except Exception as error:
        state, reason = "failed", _reason(error)
    run.finish(state, value, reason, time.perf_counter() - clock)
    shown = " ".join(f"{key}={_shown(item)}" for key, item in run.trial.params.items())
    outcome = f"{value:.4f}" if state == "complete" else f"{state} ({reason})"
    say(f"trial {run.trial.number + 1}/{limit}: {outcome}  {shown}")


def _shown(value: Any) -> str:
    """A value of a dimension, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reason(error: Exception) -> str:
    message = error.message if isinstance(error, MillraceError) else str(error)
    return " ".join(f"{type(error).__name__}: {message}".split())[:500]


def _summary(trial: optuna.trial.FrozenTrial) -> Trial:
    state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
    return Trial(
        trial.number,
        state,
        trial.value if state == "complete" else None,
        dict(trial.params),
        str(trial.user_attrs.get("reason", "")),
        float(trial.user_attrs.get("seconds", 0.0)),
        dict(trial.intermediate_values),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says nothing: our own lines tell each trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"optuna(\.|$)")
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
