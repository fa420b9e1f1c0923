"""Signs that training is unstable, seen in a window of steps: what is wrong, and what to try.

Batches differ, and near the end of training single losses and norms many times the median are nothing unusual. So it is
the median of the last few steps that is compared with the median of the window before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from trainer import log
from trainer.config import Train
from trainer.errors import DivergedError
from trainer.train.state import Progress

# The window is looked at after this many steps, and this many are compared with it.
RECENT = 5
# A jump is also this many times the usual deviation of a single step from the median (in logarithms).
JUMP_NOISE = 3.0
TINY = 1e-30
# A steady rise: each third of the window above the one before, the last above the first by this factor, and by this
# many times the usual difference between two steps.
RISE, RISE_NOISE = 1.25, 2.0
# The gradient is gone if it is this share of what it was, or less than this, while there is a loss above `SOME_LOSS`.
GONE, NOTHING, SOME_LOSS = 1e-4, 1e-12, 1e-3
# The fp16 scale has fallen by this factor within a window.
FALLEN = 8.0

# What one step leaves: its loss, the norm of its gradient, and the fp16 loss scale.
Row = Sequence[float]


def watch(now: Progress, train: Train, loss: float, norm: float, what: str, *, say: bool) -> bool:
    """Take a step into account; called on all ranks with the same figures.

    Args:
        now: the state of the run; the step is counted.
        train: `train.instability` says how.
        loss: of the step.
        norm: of its gradient, unscaled.
        what: the name that messages use.
        say: whether this rank speaks for all.

    Returns:
        Whether loss or gradient have just been found to jump up.

    Raises:
        DivergedError: training is unstable and `train.instability.action` is `stop`.
    """
    settings = train.instability
    if not settings.window or not (math.isfinite(loss) and math.isfinite(norm)):
        return False
    # In the first window the scale is still being found.
    scale = now.scale if now.step > settings.window else 0.0
    now.window = [*now.window, [loss, norm, scale]][-settings.window :]
    if now.step % RECENT or len(now.window) < max(settings.window // 2, 3 * RECENT):
        return False
    found = [(sign, sign(now.window, train)) for sign in SIGNS]
    told = [(sign, seen) for sign, seen in found if seen]
    if not told:
        return False
    sign, seen = told[0]
    if now.step - now.warned >= settings.window or settings.action == "stop":
        now.warned = now.step
        advice = ADVICE[sign]
        now.history.append({"step": now.step, "event": f"unstable: {seen}: {advice}"})
        if say:
            log.say(f"{what}: step {now.step}: unstable: {seen}: {advice}")
    if settings.action == "stop":
        raise DivergedError(f"{what}: step {now.step}: unstable: {seen} (train.instability)", ADVICE[sign])
    return sign in (loss_jumps, norm_jumps)


def loss_jumps(rows: Sequence[Row], train: Train) -> str:
    """The loss of the last steps is far above the window's."""
    return _jumps([row[0] for row in rows], train.instability.loss_ratio, "the loss")


def norm_jumps(rows: Sequence[Row], train: Train) -> str:
    """The gradient of the last steps is far above the window's."""
    return _jumps([row[1] for row in rows], train.instability.norm_ratio, "the gradient norm")


def loss_rises(rows: Sequence[Row], train: Train) -> str:
    """The loss rises steadily over the window."""
    losses = [row[0] for row in rows]
    third = len(losses) // 3
    first, second, last = (median(losses[start : start + third]) for start in (0, third, len(losses) - third))
    noise = median(abs(after - before) for before, after in pairwise(losses))
    if first < second < last and last > RISE * first > 0 and last - first > RISE_NOISE * noise:
        return f"the loss rises steadily, from {first:.4g} to {last:.4g} within {len(rows)} steps"
    return ""


def gradient_gone(rows: Sequence[Row], train: Train) -> str:
    """The gradient is nearly zero although there is a loss."""
    recent, before = rows[-RECENT:], rows[:-RECENT]
    norm, usual = median(row[1] for row in recent), median(row[1] for row in before)
    loss, usual_loss = median(row[0] for row in recent), median(row[0] for row in before)
    if norm <= max(GONE * usual, NOTHING) and loss > max(SOME_LOSS, 0.5 * usual_loss):
        return f"the gradient norm has fallen to {norm:.2g} (median of the window {usual:.2g}), with the loss at {loss:.4g}"
    return ""


def scale_falls(rows: Sequence[Row], train: Train) -> str:
    """The loss scale of fp16 falls and falls."""
    first, last = rows[0][2], rows[-1][2]
    if train.precision == "fp16" and len(rows) == train.instability.window and first >= FALLEN * last > 0:
        return f"the loss scale of fp16 has fallen from {first:g} to {last:g} within {len(rows)} steps"
    return ""


ADVICE: dict[Callable[[Sequence[Row], Train], str], str] = {
    loss_jumps: "lower train.lr, lengthen train.warmup, or set train.clip",
    norm_jumps: "set train.clip=1.0 or less, or lower train.lr",
    loss_rises: "lower train.lr",
    gradient_gone: "raise train.lr, or look for parts that give the same for all inputs (dead units, a wrong train.groups)",
    scale_falls: "use train.precision=bf16 or fp32, or lower train.lr",
}
SIGNS = tuple(ADVICE)


def _jumps(values: list[float], ratio: float, name: str) -> str:
    recent, usual = median(values[-RECENT:]), median(values[:-RECENT])
    if recent <= ratio * usual or usual <= 0:
        return ""
    # 1.48 times the median deviation is the standard deviation of normal noise.
    noise = 1.48 * median(abs(math.log(max(value, TINY) / usual)) for value in values[:-RECENT])
    if math.log(recent / usual) <= JUMP_NOISE * noise:
        return ""
    return f"{name} has jumped to {recent:.4g}, {recent / usual:.1f} times the window's median"
