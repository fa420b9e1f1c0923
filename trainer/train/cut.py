"""A step that SIGTERM cuts short: passes that compile, or are many, may take longer than the time that is left.

Until the weights are updated a step can be dropped: what it has drawn and left is put back, and the checkpoint is that of
the step before. Ranks that meet only between the passes agree on it there. Others meet inside of the passes, and one that
left would have the others wait: they finish the step, unless it is the first since the newest checkpoint, of which nothing
would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from trainer.config import Train
from trainer.errors import Preempted
from trainer.parallel.plan import Plan
from trainer.train.memory import Memory
from trainer.train.preempt import Preemption
from trainer.train.state import Progress, rng_state, set_rng_state

Made = TypeVar("Made")
Given = TypeVar("Given")


class Cut:
    """Watches the passes of a run's steps.

    Attributes:
        left: whether this rank has left the step.
    """

    def __init__(
        self,
        train: Train,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        memory: Memory,
        preemption: Preemption,
        what: str,
    ) -> None:
        self.optimizer, self.plan, self.memory, self.preemption, self.what = optimizer, plan, memory, preemption, what
        self.compiles, self.lockstep = train.compile is True, plan.lockstep and plan.ranks.size > 1
        self.left = False
        self._first: int | None = None
        self._step = -1
        self._drops = False
        self._drawn: dict[str, Any] = {}

    def passes(self, now: Progress, work: Callable[[], Made]) -> Made | None:
        """What the forward and backward passes of a step give; None where SIGTERM has cut them short.

        Args:
            now: the state of the run before the step.
            work: the passes.

        Raises:
            Preempted: SIGTERM came in the first step, of ranks that meet inside of the passes.
        """
        step = now.step
        self._first = step if self._first is None else self._first
        # Accumulated, for want of memory, of a batch that has grown, or of one that fewer ranks share than before.
        several = now.block > self.memory.micro_batch(now) * self.plan.size
        # Where Sophia's curvature has been changed already, the step is finished.
        kept = getattr(self.optimizer, "estimated", -1) == step
        self._drops = (self.compiles or several) and not self.lockstep and not kept
        if self._drops and step != self._step:
            self._step, self._drawn = step, rng_state(self.plan.device)
        nothing = self.lockstep and self.compiles and step == self._first
        if not (self._drops or nothing):
            return work()
        made = self.preemption.until_asked(work, at_once=self.compiles)
        if made is None and nothing:
            message = f"{self.what}: SIGTERM before the first step was made; there was nothing to keep"
            raise Preempted(message, "run the same command again")
        self.left = made is None
        return made

    def polled(self, batches: Iterable[Given]) -> Iterator[Given]:
        """Micro-batches; raises `Interrupted` between two of them where the step may be dropped and SIGTERM came."""
        for batch in batches:
            if self._drops:
                self.preemption.poll()
            yield batch

    def undo(self) -> None:
        """Put the generators back to where the step began."""
        if self._drops:
            set_rng_state(self._drawn, self.plan.device)
