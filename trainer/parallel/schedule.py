"""Which stage of a pipeline works on which micro-batch, and when: GPipe, 1F1B and interleaved 1F1B.

A schedule is a table of slots. In a slot each rank does one forward or backward pass of one stage, or waits; what it
makes is sent at the slot's end. All ranks have the same table, so both ends of every transfer know of it. Imports no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from trainer.config import Parallel
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """A pass of one stage over one micro-batch: forward, or backward."""

    stage: int
    part: int
    backward: bool = False

    def needs(self, last: int) -> list[Work]:
        """What must be done before, where `last` is the pipeline's last stage."""
        if not self.backward:
            return [Work(self.stage - 1, self.part)] if self.stage else []
        own = Work(self.stage, self.part)
        return [own] if self.stage == last else [own, Work(self.stage + 1, self.part, True)]


Slot = tuple[Work | None, ...]


def orders(name: str, ranks: int, stages: int, parts: int) -> list[list[Work]]:
    """The passes of each rank in their order; rank r has the stages r, r + ranks, ...

    Args:
        name: `gpipe` (Huang et al. 2019: all forward, then all backward), `1f1b` (Narayanan et al. 2019: a backward pass
            as soon as there can be one, so that a rank keeps at most `ranks` micro-batches), `interleaved` (Narayanan et
            al. 2021: several stages a rank, less waiting) or `forward` (no backward pass: for evaluation).
        ranks: processes of the pipeline.
        stages: stages in all, a multiple of `ranks`.
        parts: micro-batches; with `interleaved`, a multiple of `ranks`.
    """
    each = stages // ranks
    found = []
    for rank in range(ranks):
        forward, backward = _passes(rank, ranks, each, parts)
        ahead = len(forward)
        if name == "1f1b":
            ahead = min(ahead, ranks - 1 - rank)
        elif name == "interleaved":
            ahead = min(ahead, (each - 1) * ranks + 2 * (ranks - 1 - rank))
        elif name == "forward":
            backward = []
        order = forward[:ahead]
        for one, other in zip(forward[ahead:], backward, strict=False):
            order += [one, other]
        found.append(order + backward[len(forward) - ahead :])
    return found


def _passes(rank: int, ranks: int, each: int, parts: int) -> tuple[list[Work], list[Work]]:
    """A rank's forward and backward passes: with several stages, `ranks` micro-batches through one before the next."""
    forward, backward = [], []
    for start in range(0, parts, ranks if each > 1 else parts):
        group = range(start, min(start + ranks, parts) if each > 1 else parts)
        forward += [Work(rank + local * ranks, part) for local in range(each) for part in group]
        backward += [Work(rank + local * ranks, part, True) for local in reversed(range(each)) for part in group]
    return forward, backward


@lru_cache(maxsize=64)
def table(name: str, ranks: int, stages: int, parts: int) -> list[Slot]:
    """The slots of a schedule: each rank's passes in their order, each as soon as what it needs was sent; see `orders`."""
    left = [list(reversed(order)) for order in orders(name, ranks, stages, parts)]
    done: set[Work] = set()
    slots: list[Slot] = []
    while any(left):
        slot = tuple(order.pop() if order and done.issuperset(order[-1].needs(stages - 1)) else None for order in left)
        assert any(slot), "the passes of this schedule wait for each other"
        done.update(work for work in slot if work)
        slots.append(slot)
    return slots


def num_parts(parallel: Parallel) -> int:
    """Micro-batches that a batch is cut into.

    Raises:
        ConfigError: interleaved stages take them in groups of `parallel.pp`, and they do not fit.
    """
    pipeline, ranks = parallel.pipeline, parallel.pp
    parts = pipeline.microbatches or 2 * ranks
    if pipeline.schedule == "interleaved" and parts % ranks:
        more = -(-parts // ranks) * ranks
        raise ConfigError(
            f"parallel.pipeline.microbatches: {parts} is no multiple of parallel.pp, {ranks}, as the interleaved schedule wants",
            f"use parallel.pipeline.microbatches={more}, or parallel.pipeline.schedule=1f1b",
        )
    return parts


def spans(parallel: Parallel, num_blocks: int) -> list[tuple[int, int]]:
    """The first block, and the one after the last, of each stage; where they do not divide, the first stages have one more.

    The last stage has the head to compute besides.

    Raises:
        ConfigError: there are fewer blocks than stages.
    """
    pipeline, ranks = parallel.pipeline, parallel.pp
    each = pipeline.stages if pipeline.schedule == "interleaved" else 1
    stages = each * ranks
    if num_blocks < stages:
        fixes = [f"parallel.pp={num_blocks // each}"] if num_blocks >= 2 * each else ["parallel.pp=1"]
        if each > 1 and num_blocks >= ranks:
            fixes.append("parallel.pipeline.schedule=1f1b")
        message = f"parallel.pp: {ranks} ranks with {each} stages each" if each > 1 else f"parallel.pp: {ranks} stages"
        raise ConfigError(
            f"{message}, but the model has {num_blocks} block{'s' * (num_blocks != 1)}",
            f"use {' or '.join(fixes)}, or model.layers={stages} or more",
        )
    least, more = divmod(num_blocks, stages)
    ends = [stage * least + min(stage, more) for stage in range(stages + 1)]
    return list(pairwise(ends))
