"""LR range test (Smith 2017, "Cyclical learning rates", section 3.3): a short run whose rate grows from step to step.

The loss falls fastest at a rate that is good, and rises where it is too high. The run is one of the loop like any other,
with one phase of exponential growth; it keeps no checkpoint, evaluates nothing, and ends early where the loss has diverged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer import models, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.config.load import validate
from trainer.errors import ConfigError, DataError, DivergedError
from trainer.monitor.sinks import Figures
from trainer.train.fit import fit
from trainer.train.state import seed_all

# What a short run of its own does not need, or what would change its rates. Section train of params.yaml says the rest.
_OFF: dict[str, Any] = {
    "eval_every": 10**9,
    "log_every": 1,
    "statistics_every": 0,
    "processes": 1,
    "checkpoint_store": "",
    "early_stopping": {"patience": 0},
    "nonfinite": {"policy": "stop"},
    "instability": {"window": 0},
    "growth": {"initial": 0},
    "trace": {"start": 0},
}
FEWEST = 10
# A rise of the smoothed loss by so much of its whole fall ends what suggestions are taken from.
RISE = 0.1


@dataclass(frozen=True)
class Range:
    """What is tried.

    Attributes:
        start_lr: rate of the first step.
        end_lr: rate of the last step.
        num_iter: steps.
        smoothing: share of its neighbour in each smoothed loss, below 1.
        divergence: the run ends when the smoothed loss exceeds this many times the lowest one.
    """

    start_lr: float = 1e-6
    end_lr: float = 1.0
    num_iter: int = 100
    smoothing: float = 0.8
    divergence: float = 4.0

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0: each is the same multiple of the one before."""
        return float(self.start_lr * (self.end_lr / self.start_lr) ** (step / (self.num_iter - 1)))


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        rates: rate of each step that was made.
        losses: loss of each.
        smoothed: the same without noise.
        steepest: rate at which the smoothed loss fell fastest over the logarithm of the rate; None if it never fell.
        tenth: a tenth of the rate at which the smoothed loss was lowest; None if it never fell.
        diverged: whether the run ended early.
        optimizer: its name.
        muon_ratio: rate of the matrices over `train.lr` with muon, else None.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    tenth: float | None
    diverged: bool
    optimizer: str
    muon_ratio: float | None

    def words(self, rate: float) -> str:
        """A rate as overrides of parameters."""
        muon = f" train.muon_lr={rate * self.muon_ratio:.2g}" if self.muon_ratio else ""
        return f"train.lr={rate:.2g}{muon}"


class Ended(Exception):
    """The test has all it needs."""


class _Losses:
    """A sink that keeps the loss of each step, and an end to the run when they have diverged."""

    def __init__(self, tried: Range) -> None:
        self.tried = tried
        self.losses: list[float] = []
        self.diverged = False
        self._mean = 0.0
        self._lowest = math.inf

    def resume(self, step: int, evaluated: int) -> None:
        """There is nothing to go on from."""

    def row(self, step: int, figures: Figures) -> None:
        """Keep the loss."""
        self.losses.append(figures["train_loss"])
        self._mean += (1 - self.tried.smoothing) * (self.losses[-1] - self._mean)
        mean = self._mean / (1 - self.tried.smoothing**step)
        self._lowest = min(self._lowest, mean)
        self.diverged = step >= FEWEST and mean > self.tried.divergence * self._lowest

    def close(self, ok: bool) -> None:
        """Nothing is open."""

    def on_step(self, step: int, *_: object) -> None:
        """End the run where nothing is left to learn, before it would evaluate."""
        if self.diverged or step >= self.tried.num_iter:
            raise Ended


def find(params: Params, dataset: Dataset, tried: Range) -> Found:
    """Train a model of its own on rates that grow, and see where the loss falls fastest.

    With muon the rate of the matrices grows along, in the ratio of `train.muon_lr` to `train.lr`. What several processes
    would share is accumulated by one.

    Raises:
        ConfigError: the range is not one.
        DataError: the loss was not finite before there was anything to see.
        Preempted: SIGTERM.
    """
    check(tried)
    train = params.train
    count, ratio = tried.num_iter, train.muon_lr / train.lr
    # A phase's last step is just before its end: the peak is what the step after the last would have.
    peak = tried.rate(count)
    changes = {
        **_OFF,
        "lr": peak,
        "muon_lr": peak * ratio,
        "phases": [{"schedule": "exponential", "start": tried.start_lr / peak, "end": 1.0}],
        "max_steps": count,
        "accumulation": train.accumulation * train.processes,
    }
    tree = params.model_dump(mode="json")
    changed = validate({**tree, "train": {**tree["train"], **changes}}, "lr-find")
    task = tasks.build(changed, dataset)
    seed_all(train.seed)
    model = models.build(params.model, dataset.spec)
    kept = _Losses(tried)
    try:
        fit(changed, task, model, on_step=kept.on_step, sinks=[kept], what="lr-find")
    except Ended:
        pass
    except DivergedError as error:
        kept.diverged = True
        if len(kept.losses) < FEWEST:
            raise DataError(f"lr-find: {error.message}", "give a lower --start-lr") from None
    smooth = smoothed(kept.losses, tried.smoothing)
    rates = [tried.rate(step) for step in range(len(smooth))]
    steepest, tenth = suggest(rates, smooth)
    muon = ratio if train.optimizer == "muon" else None
    return Found(rates, kept.losses, smooth, steepest, tenth, kept.diverged, train.optimizer, muon)


def check(tried: Range) -> None:
    """Refuse what is no range.

    Raises:
        ConfigError: with the flag and its bounds.
    """
    for flag, good, bounds in (
        ("--start-lr", 0 < tried.start_lr < tried.end_lr, "above 0 and below --end-lr"),
        ("--end-lr", tried.end_lr <= 10, "at most 10"),
        ("--num-iter", tried.num_iter >= FEWEST, f"at least {FEWEST}"),
        ("--smoothing", 0 <= tried.smoothing < 1, "from 0 to below 1"),
        ("--divergence", tried.divergence > 1, "above 1"),
    ):
        if not good:
            value = getattr(tried, flag[2:].replace("-", "_"))
            raise ConfigError(f"lr-find: {flag} {value:g} is not {bounds}", "give another value")


def smoothed(losses: Sequence[float], share: float) -> list[float]:
    """Exponential means from both sides, so that a smoothed curve lags neither way.

    Args:
        losses: one for each step.
        share: of the neighbour in each mean.
    """

    def one_way(values: Sequence[float]) -> np.ndarray:
        means, mean = [], 0.0
        for step, value in enumerate(values, 1):
            mean += (1 - share) * (value - mean)
            means.append(mean / (1 - share**step))
        return np.asarray(means)

    both: list[float] = ((one_way(losses) + one_way(losses[::-1])[::-1]) / 2).tolist()
    return both


def suggest(rates: Sequence[float], losses: Sequence[float]) -> tuple[float | None, float | None]:
    """(rate of the steepest descent before the lowest loss, a tenth of the rate of the lowest); None if it never fell.

    Once half of the whole fall is done, losses after a rise by more than `RISE` of it do not count: what falls there comes
    back from it.
    """
    fall, lowest_yet = losses[0] - min(losses), np.minimum.accumulate(losses)
    risen = (losses[0] - lowest_yet > fall / 2) & (np.asarray(losses) > lowest_yet + RISE * fall)
    end = int(np.argmax(risen)) if risen.any() else len(losses)
    lowest = int(np.argmin(losses[:end]))
    if lowest < 2:
        return None, None
    slopes = np.gradient(np.asarray(losses[: lowest + 1]), np.log(rates[: lowest + 1]))
    return rates[int(np.argmin(slopes))], rates[lowest] / 10
