"""Signs of unstable training: each is seen, named once in a window, and not seen where there is none."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.errors import DivergedError
from trainer.train import instability
from trainer.train.fit import fit
from trainer.train.state import Progress, seed_all

WINDOW = 100


def section(*words):
    return load(None, [f"train.instability.window={WINDOW}", *words]).train


def told(losses, norms=None, scales=None, *words):
    """(step, event) of what is told of a run."""
    now = Progress()
    norms = norms if norms is not None else np.ones(len(losses))
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        now.step = step
        now.scale = float(scales[step - 1]) if scales is not None else now.scale
        instability.watch(now, section(*words), float(loss), float(norm), "t", say=False)
    return [(row["step"], row["event"]) for row in now.history]


def noisy(level, spread, count, seed=0):
    return level * np.random.default_rng(seed).lognormal(0.0, spread, count)


def test_a_loss_that_jumps_is_told_within_a_few_steps():
    losses = np.concatenate([noisy(2.0, 0.05, 203), noisy(5.0, 0.05, 60)])
    ((step, event),) = told(losses)
    assert 203 < step <= 210
    assert event.startswith("unstable: the loss has jumped to ")
    assert "lower train.lr" in event


def test_a_gradient_that_jumps_is_told():
    norms = np.concatenate([noisy(1.0, 0.3, 200), noisy(100.0, 0.3, 20)])
    ((_, event),) = told(noisy(2.0, 0.05, 220), norms)
    assert "the gradient norm has jumped" in event
    assert "train.clip" in event


def test_a_steady_rise_is_told():
    losses = np.linspace(1.0, 3.0, 300) * noisy(1.0, 0.03, 300)
    found = told(losses)
    assert found
    assert all("rises steadily" in event for _, event in found)


def test_a_gradient_that_is_gone_is_told_unless_the_loss_is_gone_too():
    norms = np.concatenate([noisy(1.0, 0.2, 200), np.full(20, 1e-9)])
    ((_, event),) = told(noisy(2.0, 0.05, 220), norms)
    assert "has fallen to 1e-09" in event
    losses = np.concatenate([noisy(2.0, 0.05, 200), np.full(20, 1e-7)])
    assert told(losses, norms) == []


def test_an_fp16_scale_that_falls_is_told_but_not_while_it_is_being_found():
    losses, norms = noisy(2.0, 0.05, 400), np.ones(400)
    falling = 65536.0 / 2.0 ** (np.arange(400) // 25)
    assert told(losses, norms, falling) == []
    assert "the loss scale of fp16 has fallen" in told(losses, norms, falling, "train.precision=fp16")[0][1]
    found = 65536.0 / 2.0 ** np.minimum(np.arange(400), 6)
    assert told(losses, norms, found, "train.precision=fp16") == []


@pytest.mark.parametrize("seed", range(5))
def test_what_is_usual_is_not_told(seed):
    """Falling losses, heavy tails near zero, single outliers, and a rate that restarts."""
    steps = np.arange(1500)
    falling = 4.0 * np.exp(-steps / 300) + 0.02
    assert told(falling * noisy(1.0, 0.6, 1500, seed), falling * noisy(1.0, 0.8, 1500, seed + 10)) == []
    outliers = noisy(1.0, 0.1, 1500, seed)
    outliers[::37] *= 50.0
    assert told(outliers, outliers) == []


def test_it_is_told_once_in_a_window():
    losses = np.concatenate([np.full(150, 1.0), np.linspace(3, 3e6, 300)])
    steps = [step for step, _ in told(losses)]
    assert len(steps) >= 3
    assert all(after - before >= WINDOW for before, after in pairwise(steps))


def test_what_is_not_finite_is_not_taken_into_account():
    losses = np.full(300, 1.0)
    losses[::3] = math.nan
    assert told(losses) == []


def run(tmp_path, *words):
    dataset = tiny_dataset(tmp_path / "d", "lm", rows=160)
    common = ["task.name=lm", "model.name=decoder", "model.dim=24", "model.layers=1", "model.ff=16", "train.threads=1"]
    small = ["distill.enabled=false", "train.batch_size=4", "train.log_every=1", "train.max_steps=200"]
    params = load(None, [*common, *small, "train.instability.window=40", *words])
    seed_all(0)
    return fit(params, tasks.build(params, dataset), models.build(params.model, dataset.spec))


def test_a_healthy_run_is_told_nothing_and_one_at_a_wild_rate_is_stopped(tmp_path):
    healthy = run(tmp_path / "healthy", "train.lr=0.003")
    assert not [row for row in healthy.history if "event" in row]
    wild = [
        "train.optimizer=sgd",
        "train.clip=0",
        "train.phases=[{schedule: constant, steps: 60}, {schedule: constant, start: 20, end: 20}]",
    ]
    with pytest.raises(DivergedError, match=r"step \d+: unstable: the loss .* \(train.instability\)") as caught:
        run(tmp_path / "wild", *wild, "train.lr=0.05", "train.instability.action=stop")
    assert "lower train.lr" in caught.value.hint
