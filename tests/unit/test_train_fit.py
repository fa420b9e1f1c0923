"""The loop: exactness of accumulation, early stopping, precision, divergence, hooks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.errors import DivergedError
from trainer.monitor.watch import Watch
from trainer.parallel.dims import Dims
from trainer.parallel.group import Ranks
from trainer.parallel.plan import Plan
from trainer.tasks.classify import Classify
from trainer.train import schedules
from trainer.train.checkpoint import Checkpoints
from trainer.train.fit import fit
from trainer.train.loop import Loop
from trainer.train.preempt import Preemption
from trainer.train.state import seed_all

FAMILY = {"classify": "encoder", "lm": "decoder", "image": "cnn"}
SMALL = {
    "encoder": ["model.dim=16", "model.layers=1", "model.ff=16", "model.heads=2"],
    "decoder": ["model.dim=24", "model.layers=1", "model.ff=16"],
    "cnn": ["model.width=4"],
    "ngram": ["model.buckets=512", "model.dim=16"],
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return {name: tiny_dataset(tmp_path_factory.mktemp(name) / "d", name, rows=160) for name in FAMILY}


def params_of(task, model, *overrides):
    words = [f"task.name={task}", f"model.name={model}", "distill.enabled=false", "train.threads=1", *SMALL[model]]
    return load(None, [*words, *overrides])


def train(datasets, task, *overrides, model="", kind=None, **hooks):
    params = params_of(task, model or FAMILY[task], *overrides)
    built = kind(params, datasets[task]) if kind else tasks.build(params, datasets[task])
    seed_all(params.train.seed)
    return fit(params, built, models.build(params.model, datasets[task].spec), **hooks)


def losses(fitted):
    return [row["train_loss"] for row in fitted.history if "train_loss" in row]


def same_weights(first, second):
    ones, twos = first.model.state_dict(), second.model.state_dict()
    return all(torch.equal(ones[name], twos[name]) for name in ones)


@pytest.mark.parametrize("task", FAMILY)
def test_eight_micro_batches_of_one_equal_one_of_eight(datasets, task):
    # Rows and windows of different lengths: dividing each micro-batch by its own count would be wrong. Pictures are
    # changed at random, and must be changed alike.
    # (After some steps a rounded value falls on the other side of a ReLU's kink, and the convolutions part.)
    steps = 6 if task == "image" else 12
    common = [
        f"train.max_steps={steps}",
        "train.log_every=1",
        "model.dropout=0.0",
        "train.optimizer=sgd",
        "train.lr=0.1",
    ]
    whole = train(datasets, task, "train.batch_size=8", "train.accumulation=1", *common)
    parts = train(datasets, task, "train.batch_size=1", "train.accumulation=8", *common)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    assert losses(whole)[-1] != pytest.approx(losses(whole)[0], abs=1e-3)


@pytest.mark.parametrize("task", FAMILY)
def test_same_seed_same_bits_and_another_seed_others(datasets, task):
    common = ["train.max_steps=6", "train.log_every=1", "train.batch_size=16"]
    first, again = train(datasets, task, *common), train(datasets, task, *common)
    assert first.history == again.history
    assert same_weights(first, again)
    assert losses(train(datasets, task, *common, "train.seed=1")) != losses(first)


@pytest.mark.parametrize("task", FAMILY)
def test_every_task_learns(datasets, task):
    fitted = train(datasets, task, "train.epochs=6", "train.batch_size=16", "train.lr=0.01")
    evaluations = [row["val_loss"] for row in fitted.history if "val_loss" in row]
    assert min(evaluations[1:]) < 0.9 * evaluations[0]
    assert not fitted.model.training


def test_returned_weights_are_those_of_the_best_evaluation(datasets):
    fitted = train(datasets, "classify", "train.epochs=12", "train.batch_size=8", "train.lr=0.03", model="ngram")
    scores = {row["step"]: row["val_accuracy"] for row in fitted.history if "val_accuracy" in row}
    assert fitted.metrics["val_accuracy"] == max(scores.values()) == scores[fitted.best_step]
    task = tasks.build(params_of("classify", "ngram"), datasets["classify"])
    assert task.evaluate(fitted.model, "val")["loss"] == fitted.metrics["val_loss"]
    assert fitted.best_step < fitted.steps


def test_history_is_json_and_says_rate_and_epoch(datasets):
    fitted = train(datasets, "classify", "train.epochs=2", "train.batch_size=16", "train.log_every=3", model="ngram")
    rows = [row for row in json.loads(json.dumps(fitted.history)) if "lr" in row]
    params = params_of("classify", "ngram")
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 14]
    for row in rows:
        rate = params.train.lr * schedules.factor(row["step"] - 1, 14, params.train)
        assert row["lr"] == pytest.approx(rate)
        assert row["grad_norm"] > 0


def test_small_data_gets_more_epochs_until_they_have_min_steps(datasets):
    words = ["train.epochs=2", "train.batch_size=16"]
    plain = train(datasets, "classify", *words, model="ngram").steps
    per_epoch = plain // 2
    assert train(datasets, "classify", *words, f"train.min_steps={plain}", model="ngram").steps == plain
    more = train(datasets, "classify", *words, f"train.min_steps={plain + 1}", model="ngram")
    assert more.steps == 3 * per_epoch
    assert train(datasets, "classify", *words, "train.min_steps=100", "train.max_steps=3", model="ngram").steps == 3


def test_min_steps_are_those_of_one_process(datasets):
    params = params_of("classify", "ngram", "train.epochs=1", "train.batch_size=8", "train.min_steps=60")
    task = tasks.build(params, datasets["classify"])
    totals = []
    for size in (1, 2):
        loop = Loop.__new__(Loop)
        loop.train, loop.task = params.train, task
        loop._set_block(params.train.batch_size * size)
        totals.append(loop.total * size)
    assert totals[0] >= 60
    assert abs(totals[1] - totals[0]) <= loop.total


def test_max_steps_overrules_epochs_in_both_directions(datasets):
    for steps in (3, 40):
        fitted = train(datasets, "classify", f"train.max_steps={steps}", "train.epochs=1", "train.batch_size=16")
        assert fitted.steps == steps


class Scripted(Classify):
    """A task whose scores are written down in advance."""

    scores: tuple[float, ...] = ()

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.left = list(self.scores)

    def summarise(self, split, total):
        return {**super().summarise(split, total), "accuracy": self.left.pop(0)}


@pytest.mark.parametrize(
    ("patience", "threshold", "scores", "steps", "best"),
    [
        (2, 0.0, (0.1, 0.5, 0.4, 0.3, 0.9), 4, 2),
        (2, 0.0, (0.5, 0.4, 0.6, 0.5, 0.55, 0.9), 5, 3),
        (2, 0.2, (0.5, 0.6, 0.65, 0.9), 3, 3),
        (0, 0.0, (0.9, 0.1, 0.1, 0.1, 0.1, 0.2), 6, 1),
    ],
)
def test_early_stopping_counts_evaluations_without_enough_gain(datasets, patience, threshold, scores, steps, best):
    kind = type("Script", (Scripted,), {"scores": scores})
    words = [f"train.early_stopping.patience={patience}", f"train.early_stopping.threshold={threshold}"]
    fitted = train(datasets, "classify", "train.eval_every=1", "train.max_steps=6", *words, kind=kind, model="ngram")
    assert (fitted.steps, fitted.best_step) == (steps, best)


class Poisoned(Classify):
    """A task whose loss, or only its gradient, is not finite from step 4 on."""

    where = "loss"
    calls = 0

    def losses(self, model, batch):
        type(self).calls += 1
        terms = super().losses(model, batch)
        if self.calls == 4:
            zero = next(model.parameters()).sum() * 0.0
            terms["poison"] = zero / 0.0 if self.where == "loss" else torch.sqrt(zero)
        return terms


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_touches_the_weights(datasets, where):
    kind = type("Poison", (Poisoned,), {"where": where, "calls": 0})
    params = params_of("classify", "ngram", "train.max_steps=8")
    model = models.build(params.model, datasets["classify"].spec)
    seen = []
    with pytest.raises(DivergedError, match=f"step 4 of 8: {where}") as caught:
        fit(params, kind(params, datasets["classify"]), model,
            on_step=lambda *_: seen.append({k: v.clone() for k, v in model.state_dict().items()}))  # fmt: skip
    assert caught.value.exit_code == 3
    assert len(seen) == 3
    assert all(torch.equal(seen[-1][name], value) for name, value in model.state_dict().items())


def test_fp16_overflow_halves_the_scale_and_skips_the_step(datasets):
    class Overflow(Classify):
        calls = 0

        def losses(self, model, batch):
            Overflow.calls += 1
            terms = super().losses(model, batch)
            if Overflow.calls == 2:
                weight = next(model.parameters())
                # Its value is 0, its gradient infinite.
                terms["overflow"] = torch.sqrt(weight.sum() * 0.0)
            return terms

    states = []
    fitted = train(
        datasets, "classify", "train.max_steps=4", "train.precision=fp16", "train.log_every=1", kind=Overflow,
        on_step=lambda step, total, model: states.append({k: v.clone() for k, v in model.state_dict().items()}),
    )  # fmt: skip
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[1][k], states[2][k]) for k in states[0])
    assert fitted.steps == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(datasets, precision):
    common = ["train.max_steps=8", "train.log_every=1", "model.dropout=0.0", "train.batch_size=16"]
    exact = train(datasets, "lm", *common)
    mixed = train(datasets, "lm", *common, f"train.precision={precision}")
    assert losses(mixed) == pytest.approx(losses(exact), rel=0.02)
    assert losses(mixed) != losses(exact)


def test_clipping_bounds_the_update(datasets):
    common = [
        "train.max_steps=1",
        "train.optimizer=sgd",
        "train.momentum=0.0",
        "train.lr=1.0",
        "train.schedule=constant",
    ]
    params = params_of("classify", "ngram", *common, "train.clip=0.01")
    model = models.build(params.model, datasets["classify"].spec)
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit(params, tasks.build(params, datasets["classify"]), model)
    moved = torch.cat([(value - before[name]).flatten() for name, value in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_hooks_are_called_and_what_they_raise_ends_the_run(datasets):
    steps, evaluations = [], []

    class Stop(Exception):
        pass

    def on_eval(step, metrics):
        evaluations.append((step, sorted(metrics)))
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(datasets, "classify", "train.max_steps=9", "train.eval_every=2", model="ngram",
              on_eval=on_eval, on_step=lambda step, total, model: steps.append((step, total)))  # fmt: skip
    assert steps == [(1, 9), (2, 9), (3, 9), (4, 9)]
    assert evaluations == [
        (2, ["val_accuracy", "val_loss", "val_macro_f1"]),
        (4, ["val_accuracy", "val_loss", "val_macro_f1"]),
    ]


def test_threads_and_deterministic_mode_are_set_inside_and_put_back(datasets):
    inside = []
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    train(datasets, "classify", "train.max_steps=1", "train.threads=3", model="ngram",
          on_step=lambda *_: inside.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())))  # fmt: skip
    assert inside == [(3, True)]
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_every_epoch_uses_every_example_once(datasets):
    seen = []

    class Watched(Classify):
        def batch(self, split, index):
            if split == "train":
                seen.extend(index.tolist())
            return super().batch(split, index)

    train(datasets, "classify", "train.epochs=2", "train.batch_size=10", kind=Watched, model="ngram")
    count = datasets["classify"].meta["rows"]["train"]
    assert sorted(seen[:count]) == sorted(seen[count:]) == list(range(count))
    assert seen[:count] != seen[count:]


def test_class_weights_raise_the_recall_of_a_rare_class(datasets):
    task = tasks.build(params_of("classify", "ngram", "train.class_weights=balanced"), datasets["classify"])
    labels = np.asarray(task.split("train").labels)
    assert task.weights is not None
    counts = np.bincount(labels)
    np.testing.assert_allclose(task.weights.numpy() * counts, len(labels) / len(counts), rtol=1e-5)


def test_a_run_that_goes_on_alone_keeps_the_size_of_the_steps_of_two_ranks(datasets, tmp_path):
    # What two ranks leave: their steps take twice the batch. (Accumulation makes the same steps in one process.)
    common = ["train.max_steps=0", "train.epochs=2", "train.log_every=1", "model.dropout=0.0", "train.optimizer=sgd"]
    params = params_of("classify", "encoder", "train.batch_size=4", *common)
    task = tasks.build(params, datasets["classify"])

    def loop(ranks_batch, hook=None):
        seed_all(0)
        model = models.build(params.model, datasets["classify"].spec)
        checkpoints = Checkpoints(tmp_path, 2, Ranks(), "run")
        device = torch.device("cpu")
        plan = Plan(params, Dims(), Ranks(), device)
        watch = Watch(task, model, params.train, device, 1)
        made = Loop(params, task, model, plan, checkpoints, Preemption(), "t", None, hook, watch)
        if ranks_batch:
            made._set_block(ranks_batch)
        return made

    whole = loop(8)
    whole.run()

    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 5:
            killed.save(durable=True)
            raise Killed

    killed = loop(8, kill)
    with pytest.raises(Killed):
        killed.run()
    alone = loop(0)
    alone.resume()
    assert alone.total == whole.total == 28
    alone.run()
    assert alone.progress.history == whole.progress.history
