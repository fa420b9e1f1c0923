"""Stage `tune`: search for hyper-parameters with short training runs on the dataset.

best.json      {"params": {dotted key: value}, "value", "metric", "direction", "trial"}; params empty without a search
trials.jsonl   one line per trial: number, state, value, params, reason, seconds, evaluations
search.json    all of it, for the report
search.html    history, importance, parallel coordinates and all trials
"""

from __future__ import annotations

from pathlib import Path

from trainer import storage
from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.config.load import with_values
from trainer.config.names import nearest
from trainer.errors import Preempted
from trainer.log import say
from trainer.stage import Call, Result
from trainer.tune import space
from trainer.tune.search import Report, SearchError, search
from trainer.tune.space import Values
from trainer.tune.written import VOLATILE, meta_of, metrics_of, write


def run(call: Call) -> Result:
    """Search, and write what was found.

    Raises:
        MillraceError: no trial has a score, the metric is not one of the task's, or a grid is continuous.
        Preempted: SIGTERM arrived; the same command goes on from the last finished trial.
    """
    params, tune, out = call.params, call.params.tune, call.outputs["tuning"]
    if not tune.enabled or not tune.space:
        say("tune: off, train takes the parameters as they are")
        write(out, params, None)
        return Result(volatile=VOLATILE, meta=meta_of(params, None))
    from trainer.train.preempt import Preemption

    dataset = Dataset(call.inputs["dataset"])
    tree = params.model_dump(mode="json")
    first = space.configured(tune, tree)
    for each in space.outside(tune, tree):
        say(f"tune: {each}: not tried, and train takes what is found; set tune.enabled=false to train with it")
    train = params.train
    whole_epochs = not (train.eval_every or train.min_steps or train.max_steps or tune.max_steps)
    evaluations = (tune.epochs or params.train.epochs) if whole_epochs else 0
    with Preemption() as preemption:

        def objective(number: int, values: Values, report: Report) -> float:
            if preemption.asked:
                raise Preempted("tune: SIGTERM between two trials; the journal was kept", "run the same command again")
            return train_once(params, dataset, values, report, call.scratch / f"trial-{number}")

        found = search(tune, objective, call.scratch, first=first, evaluations=evaluations)
    best = write(out, params, found)
    say(f"tune: best of {len(found.trials)} trials", **{tune.metric: best["value"]}, **best["params"])
    return Result(metrics_of(params, found), meta_of(params, found), VOLATILE)


def train_once(params: Params, dataset: Dataset, values: Values, report: Report, scratch: Path | None) -> float:
    """Train with the values set and return the best value of the metric; a trial's objective.

    Args:
        params: the configuration that the values change.
        dataset: what to train on.
        values: dotted key -> value.
        report: told the metric after each evaluation.
        scratch: the trial's own folder for checkpoints, removed when it is done; None keeps none.
    """
    from trainer import models, tasks
    from trainer.tasks.wrapped import FewerRows
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    changed = with_values(params, values | _fidelity(params))
    task = tasks.build(changed, dataset)
    if params.tune.rows:
        task = FewerRows(task, params.tune.rows)

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        report(step, _metric(params, metrics))

    done = True
    try:
        seed_all(changed.train.seed)
        model = models.build(changed.model, dataset.spec)
        fitted = fit(changed, task, model, scratch=scratch, on_eval=on_eval, what="trial")
        return _metric(params, fitted.metrics)
    except (Preempted, KeyboardInterrupt, SystemExit):
        done = False
        raise
    finally:
        if done and scratch:
            storage.remove(scratch)


def _fidelity(params: Params) -> Values:
    """What makes a trial cheaper than the training it stands for."""
    tune, train = params.tune, params.train
    given: Values = {"train.epochs": tune.epochs, "train.max_steps": tune.max_steps}
    if tune.epochs:
        # The same share of the steps as of the epochs.
        given["train.min_steps"] = train.min_steps * tune.epochs // train.epochs
    return {key: value for key, value in given.items() if value or key == "train.min_steps"}


def _metric(params: Params, metrics: dict[str, float]) -> float:
    name = params.tune.metric
    if name not in metrics:
        known = [key for key in metrics if key.startswith("val_")]
        raise SearchError(
            f"tune.metric: task {params.task.name!r} has no metric {name!r}; {nearest(name, known)}", "correct the name"
        )
    return float(metrics[name])
