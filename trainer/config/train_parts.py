"""Parts of section `train` that have several keys."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from trainer import plugins
from trainer.config.base import Section
from trainer.config.names import one_of

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class EarlyStopping(Section):
    """Stop when the validation metric no longer improves."""

    patience: int = Field(default=0, ge=0)
    """Evaluations without an improvement before training stops; 0 never stops early."""
    threshold: float = Field(default=0.0, ge=0.0)
    """Smallest change that counts as an improvement."""


class Sophia(Section):
    """Sophia-G (Liu et al. 2024): momentum divided by an estimate of the curvature."""

    rho: float = Field(default=0.04, gt=0.0)
    """Factor of the curvature that the momentum is divided by: the smaller it is, the more of the step is clipped."""
    every: int = Field(default=10, ge=1)
    """Estimate the curvature before every so many steps; each estimate costs about as much as a step."""


class GaLore(Section):
    """GaLore (Zhao et al. 2024): Adam's moments in a subspace of the gradient of each matrix."""

    rank: int = Field(default=128, ge=1)
    """Dimensions of the subspace; matrices that are no larger go with plain AdamW."""
    every: int = Field(default=200, ge=1)
    """Find the subspace anew after this many steps."""
    scale: float = Field(default=0.25, gt=0.0)
    """Factor of updates that come from the subspace."""


class Group(Section):
    """Parameters with a rate or decay of their own."""

    match: str = Field(min_length=1)
    """Pattern of parameter names, with * and ? (`embedding.*`, `blocks.0.*`, `*.bias`)."""
    lr_scale: float = Field(default=1.0, ge=0.0)
    """Factor of the rate; 0 freezes the parameters: no gradient, no state."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Decay of all that match, vectors too; none takes `train.weight_decay` for matrices."""


class Phase(Section):
    """One phase of a chained schedule."""

    schedule: Annotated[str, AfterValidator(one_of(plugins.SCHEDULES))] = "linear"
    """Shape of the way from `start` to `end`."""
    steps: float = Field(default=0.0, ge=0.0)
    """Length: a share of all steps if below 1, else a number of steps; 0, in the last phase alone, takes what is left."""
    start: float = Field(default=1.0, ge=0.0)
    """Factor of the peak rate at the beginning."""
    end: float = Field(default=1.0, ge=0.0)
    """Factor of the peak rate at the end."""

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        if self.schedule == "constant" and self.start != self.end:
            raise ValueError(f"a constant phase cannot lead from {self.start:g} to {self.end:g}: use linear")
        if self.schedule == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError("an exponential phase neither starts nor ends at 0: use a small factor, such as 0.001")
        return self


def check_phases(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """A pydantic validator: the last phase takes what is left, and the others leave something."""
    if not phases:
        return phases
    if phases[-1].steps:
        raise ValueError(
            f"phase {len(phases)}, the last, takes what is left: leave out its steps ({phases[-1].steps:g})"
        )
    for number, phase in enumerate(phases[:-1], 1):
        if not phase.steps:
            raise ValueError(f"phase {number} has no steps; only the last takes what is left")
    shares = sum(phase.steps for phase in phases if phase.steps < 1.0)
    if shares >= 1.0:
        raise ValueError(f"the shares of the phases before the last sum to {shares:g}, which leaves nothing for it")
    return phases


class NonFinite(Section):
    """What to do when a loss or a gradient is not finite."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop` ends the run, `skip` leaves the step out, `rollback` goes back to the last checkpoint with a lower rate."""
    limit: int = Field(default=10, ge=1)
    """Steps skipped, or times gone back, before the run is ended all the same."""
    lr_factor: float = Field(default=0.5, gt=0.0, le=1.0)
    """Factor of the rate at each rollback."""


class Instability(Section):
    """Watch the loss and the gradient over a window of steps."""

    window: int = Field(default=100, ge=0)
    """Steps that the last ones are compared with; 0 watches nothing."""
    loss_ratio: float = Field(default=2.0, gt=1.0)
    """A loss above this many times the window's median counts as a spike."""
    norm_ratio: float = Field(default=20.0, gt=1.0)
    """A gradient norm above this many times the window's median counts as a spike."""
    action: Literal["warn", "stop"] = "warn"
    """`warn` says why and what to try, `stop` also ends the run."""


class Recompute(Section):
    """Recompute activations in the backward pass instead of keeping them (Chen et al. 2016)."""

    mode: Literal["none", "blocks", "selective"] = "none"
    """`blocks` recomputes whole blocks, `selective` keeps what is dear (products of matrices, attention)."""
    every: int = Field(default=1, ge=1)
    """With `blocks`: recompute one block in this many."""


class Growth(Section):
    """A step's batch that grows while training is stable and shrinks when it is not."""

    initial: int = Field(default=0, ge=0)
    """Examples of the first steps over all ranks; 0 keeps the batch as it is throughout."""
    target: int = Field(default=0, ge=0)
    """Most examples of a step."""
    minimum: int = Field(default=1, ge=1)
    """Fewest examples of a step."""
    factor: float = Field(default=2.0, gt=1.0)
    """Factor by which a stable batch grows."""
    shrink: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Factor by which an unstable batch shrinks."""
    stable_steps: int = Field(default=100, ge=1)
    """Steps without a spike after which the batch grows."""


class Trace(Section):
    """A trace of torch.profiler."""

    start: int = Field(default=0, ge=0)
    """First step of the trace; 0 traces nothing."""
    steps: int = Field(default=3, ge=1)
    """Steps that are traced."""
