"""A batch that grows and shrinks: every example of an epoch once, the rate by examples, exact over a kill."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models
from trainer.config.load import load
from trainer.errors import ConfigError, Preempted
from trainer.tasks.classify import Classify
from trainer.train import growth, inject
from trainer.train.fit import fit
from trainer.train.state import Progress, seed_all

WORDS = [
    "task.name=classify", "model.name=encoder", "model.dim=16", "model.layers=1", "model.ff=16", "model.heads=2",
    "distill.enabled=false", "train.threads=1", "train.log_every=1", "train.batch_size=8", "train.epochs=6",
    "train.growth.initial=8", "train.growth.target=32", "train.growth.stable_steps=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("d") / "d", "classify", rows=160)


class Watched(Classify):
    """A task that notes which examples are trained on, and in what batches."""

    seen: list[list[int]]

    def batch(self, split, index):
        if split == "train":
            self.seen.append(index.tolist())
        return super().batch(split, index)


def train(dataset, *words, on_step=None, scratch=None):
    """A fitted run, and the rows of each micro-batch."""
    params = load(None, [*WORDS, *words])
    seed_all(params.train.seed)
    model = models.build(params.model, dataset.spec)
    kind = type("Kind", (Watched,), {"seen": []})
    return fit(params, kind(params, dataset), model, on_step=on_step, scratch=scratch), kind.seen


def events(fitted):
    return [(row["step"], row["event"]) for row in fitted.history if "event" in row]


def test_a_stable_batch_grows_to_its_target_and_every_epoch_has_every_example_once(dataset):
    fitted, seen = train(dataset)
    assert events(fitted) == [
        (10, "steps of 16 examples instead of 8: stable for 10 steps"),
        (20, "steps of 32 examples instead of 16: stable for 10 steps"),
    ]
    count = dataset.meta["rows"]["train"]
    rows = [row for batch in seen for row in batch]
    assert len(rows) == 6 * count
    for epoch in range(6):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))
    # 112 rows: 10 steps of 8 and 2 of 16; 7 of 16 and, from the second half of that epoch on, ...
    assert fitted.steps == max(row["step"] for row in fitted.history)
    assert fitted.steps < 6 * count / 8 * 0.5


def test_the_rate_goes_by_examples_and_ends_where_it_would(dataset):
    fitted, _ = train(dataset, "train.schedule=linear", "train.lr=0.01")
    rates = [row["lr"] for row in fitted.history if "lr" in row]
    assert rates == sorted(rates, reverse=True)
    plain, _ = train(dataset, "train.schedule=linear", "train.lr=0.01", "train.growth.initial=0")
    by_step = [row["lr"] for row in plain.history if "lr" in row]
    assert rates[:10] == by_step[:10]
    # After 20 steps: 10 x 8 and 10 x 16 examples, less what the end of an epoch cut off.
    assert rates[20] == by_step[(112 + 8 * 16) // 8]
    assert rates[-1] == pytest.approx(by_step[-1], abs=0.01 * 4 / 84)


def test_steps_that_were_asked_for_stay_as_many(dataset):
    fitted, _ = train(dataset, "train.max_steps=25")
    assert fitted.steps == 25


def test_trouble_shrinks_it_once_and_not_below_its_minimum(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "nan-loss@13,nan-loss@14,nan-loss@22,nan-gradient@31,nan-loss@39")
    words = ["train.nonfinite.policy=skip", "train.growth.minimum=6", "train.growth.stable_steps=1000"]
    fitted, _ = train(dataset, *words, "train.max_steps=50")
    changes = [event for _, event in events(fitted) if event.startswith("steps of")]
    assert changes == ["steps of 6 examples instead of 8: training is not stable"]


@pytest.mark.parametrize("kill", [9, 10, 14, 21])
def test_killed_and_resumed_it_is_the_same_run(dataset, tmp_path, kill):
    whole, seen = train(dataset)

    def terminate(step, *_):
        if step == kill:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(dataset, on_step=terminate, scratch=tmp_path)
    resumed, rest = train(dataset, scratch=tmp_path)
    assert resumed.history == whole.history
    assert rest == seen[-len(rest) :]
    ones, twos = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ones[name], twos[name]) for name in ones)


def test_blocks_stay_between_their_bounds():
    train_section = load(None, [*WORDS, "train.growth.minimum=5", "train.growth.stable_steps=10"]).train
    now, block, blocks = Progress(), 8, []
    for step in range(1, 200):
        now.step = step
        block = growth.next_block(now, train_section, block, trouble=step > 60)
        blocks.append(block)
    assert Counter(blocks).keys() == {8, 16, 32, 5}
    assert max(blocks[:60]) == 32
    assert min(blocks[60:]) == 5


@pytest.mark.parametrize(
    "words", [["train.growth.target=4"], ["train.growth.minimum=9"], ["train.instability.window=0"]]
)
def test_bounds_that_contradict_each_other_are_refused(dataset, words):
    with pytest.raises(ConfigError, match=r"train\.growth: "):
        train(dataset, *words)
