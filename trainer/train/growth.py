"""A step's batch that grows while training is stable and shrinks when it is not (`train.growth`).

The idea is that of Smith et al. 2018 (small batches first), driven by stability as one of the guides has it. The rate is
untouched: no guide scales it. Where a run goes by epochs, its schedule goes by examples: a step of twice the examples goes twice
as far along it.
"""

from __future__ import annotations

import math

from trainer.config import Train
from trainer.errors import ConfigError
from trainer.train.instability import RECENT
from trainer.train.state import Progress


def first_block(train: Train, block: int) -> int:
    """Examples of the first step over all ranks; `block` where the batch does not grow.

    Raises:
        ConfigError: the bounds contradict each other, or nothing is watched.
    """
    growth = train.growth
    if not growth.initial:
        return block
    if not growth.minimum <= growth.initial <= growth.target:
        message = f"train.growth: minimum {growth.minimum}, initial {growth.initial}, target {growth.target}"
        raise ConfigError(f"{message} are not in order", "set minimum <= initial <= target")
    if not train.instability.window:
        raise ConfigError("train.growth: goes by train.instability, whose window is 0", "set train.instability.window")
    return growth.initial


def next_block(now: Progress, train: Train, block: int, *, trouble: bool) -> int:
    """Examples of the next step over all ranks.

    Args:
        now: the state of the run; the step is counted.
        train: `train.growth` says how.
        block: examples of this step.
        trouble: whether the step was refused, or loss or gradient have just jumped up.
    """
    growth = train.growth
    if not growth.initial:
        return block
    now.stable += 1
    made = block
    if trouble and now.stable > RECENT:  # else it is still the trouble of the last time
        made, why = max(growth.minimum, int(block * growth.shrink)), "training is not stable"
        now.stable = 0
    elif now.stable >= growth.stable_steps:
        made, why = min(growth.target, math.ceil(block * growth.factor)), f"stable for {now.stable} steps"
        now.stable = 0
    if made != block:
        now.history.append({"step": now.step, "event": f"steps of {made} examples instead of {block}: {why}"})
    return made


def total_steps(now: Progress, train: Train, examples: int, epochs: int, total: int, block: int) -> int:
    """Steps of the run, if all that are left have `block` examples.

    Args:
        now: the state of the run.
        train: the section; with `max_steps` it says itself.
        examples: of an epoch.
        epochs: of the run.
        total: what it is where the batch does not grow.
        block: examples of a step over all ranks.
    """
    if train.max_steps or not train.growth.initial:
        return total
    left = math.ceil((examples - now.offset) / block) + (epochs - now.epoch - 1) * math.ceil(examples / block)
    return now.step + max(left, 0)


def place(now: Progress, train: Train, examples: int, epochs: int, total: int) -> tuple[int, int]:
    """Where a step is on the schedule of the rate, and how long that is: steps, those of the first size where it grows."""
    initial = train.growth.initial
    if train.max_steps or not initial:
        return now.step, total
    return (now.epoch * examples + now.offset) // initial, math.ceil(epochs * examples / initial)
