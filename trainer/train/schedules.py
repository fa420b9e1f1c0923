"""Shapes of the learning rate after warm-up, and chains of them.

Each is scale(progress, train) -> factor of the peak rate, for progress in 0..1 of the steps after the warm-up. To add
one, write such a function and enter it in `trainer.plugins.SCHEDULES`.
"""

from __future__ import annotations

import math

from trainer import plugins
from trainer.config import Train


def constant(progress: float, train: Train) -> float:
    """The peak rate throughout."""
    return 1.0


def linear(progress: float, train: Train) -> float:
    """A straight line from the peak to `min_lr_ratio` of it."""
    return _above(1.0 - progress, train)


def cosine(progress: float, train: Train) -> float:
    """Half a cosine from the peak to `min_lr_ratio` of it (Loshchilov and Hutter 2017)."""
    return _above(0.5 * (1.0 + math.cos(math.pi * progress)), train)


def cosine_restarts(progress: float, train: Train) -> float:
    """`restarts` cycles of the cosine, each starting at the peak (Loshchilov and Hutter 2017)."""
    within = 1.0 if progress >= 1.0 else progress * train.restarts % 1.0
    return cosine(within, train)


def polynomial(progress: float, train: Train) -> float:
    """(1 - progress) to the `power`, down to `min_lr_ratio` of the peak."""
    return _above((1.0 - progress) ** train.power, train)


def exponential(progress: float, train: Train) -> float:
    """Exponential decay that reaches `gamma` at the end, never below `min_lr_ratio`."""
    return float(max(train.gamma**progress, train.min_lr_ratio))


def wsd(progress: float, train: Train) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): the peak, then a line to `min_lr_ratio` over the last `decay` share."""
    return _above(min(1.0, (1.0 - progress) / train.decay), train)


def _above(factor: float, train: Train) -> float:
    return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * factor


def warmup_steps(train: Train, total: int) -> int:
    """Steps of linear warm-up: `train.warmup` is a share of `total` if below 1, else a number of steps."""
    steps = train.warmup * total if train.warmup < 1.0 else train.warmup
    return min(round(steps), total)


def factor(step: int, total: int, train: Train) -> float:
    """Factor of the peak rate for the optimizer step number `step` (from 0) of `total`."""
    if train.phases:
        return _phased(step, total, train)
    warmup = warmup_steps(train, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return float(plugins.load(plugins.SCHEDULES[train.schedule])(min(progress, 1.0), train))


def phase_ends(train: Train, total: int) -> list[int]:
    """The step at which each of `train.phases` is over; the last takes what is left of `total`."""
    ends: list[int] = []
    for phase in train.phases[:-1]:
        length = phase.steps * total if phase.steps < 1.0 else phase.steps
        ends.append(min((ends[-1] if ends else 0) + round(length), total))
    return [*ends, total]


def _phased(step: int, total: int, train: Train) -> float:
    """The factor in the phase that a step belongs to: as torch's SequentialLR, the first step of a phase is at its start."""
    ends = phase_ends(train, total)
    index = next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)
    phase, begin, end = train.phases[index], [0, *ends][index], ends[index]
    progress = min((step - begin) / max(1, end - begin), 1.0)
    if phase.schedule == "exponential":
        # From one factor to the other by a constant ratio; `gamma` is the whole schedule's.
        return float(phase.start * (phase.end / phase.start) ** progress)
    shape = plugins.load(plugins.SCHEDULES[phase.schedule])(progress, train.model_copy(update={"min_lr_ratio": 0.0}))
    return float(phase.end + (phase.start - phase.end) * shape)
