"""What a forward pass keeps for the backward pass, tensor by tensor: bytes for each token of a sequence.

The table follows `trainer.models.decoder.Block`; a test compares it with what autograd keeps of the real one. Sizes are
those of Korthikanti et al. 2022, section 4, for a Llama block under autocast, whose residual stream stays float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.planner.layout import Layout
from trainer.planner.shape import Shape


@dataclass(frozen=True)
class Habits:
    """How the code that is planned for treats its tensors; the defaults are this product's.

    Attributes:
        autocast: mixed precision by autocast: the residual stream and the norms stay float32, weights are cast at each
            use and the casts kept. Otherwise all of a block has the width of its products.
        normed_once: under autocast, norms give 16 bits (our own on CPUs); otherwise each product casts their float32 anew.
        gathered: bytes of a weight that FSDP gathers.
        copy_of_best: the best weights so far are kept beside those that are trained.
        kept: names of a block's tensors that selective recomputation keeps.
        logits: how many are held at a time by the loss; 0 is all.
    """

    autocast: bool = True
    normed_once: bool = False
    gathered: int = 4
    copy_of_best: bool = True
    kept: tuple[str, ...] = ("query", "key", "value", "attended", "proj", "gate", "up", "down")
    logits: int = 2**27


OURS = Habits()


@dataclass(frozen=True)
class Tensor:
    """Bytes for a token; `along` is what divides them: `tp` whole heads and columns, `sequence` the sequence, or nothing."""

    name: str
    bytes: float
    along: str = ""


def block_tensors(shape: Shape, layout: Layout, habits: Habits = OURS) -> list[Tensor]:
    """All that a block keeps without recomputation."""
    c = layout.width
    autocast = habits.autocast and layout.mixed
    stream = 4 if autocast or not layout.mixed else c
    d, ff = shape.dim, shape.ff
    between = "sequence" if layout.sequence_parallel else ""
    found = []
    for branch, uses in (("input", 3), ("middle", 2)):
        found += [Tensor(branch, stream * d, between), Tensor(f"{branch} scale", 4, between)]
        # Autocast casts the norm's output once for each matrix that it meets, and keeps every cast.
        found.append(Tensor(f"{branch} normed", c * d * (uses if autocast and not habits.normed_once else 1)))
    found += [
        Tensor("query, key, value", 3 * c * d, "tp"),  # keys and values repeated for their group of queries
        Tensor("attended", c * d + 4 * shape.heads, "tp"),
        Tensor("gate", c * ff, "tp"),
        Tensor("up", c * ff, "tp"),
        Tensor("activated", c * ff, "tp"),
        Tensor("product", c * ff, "tp"),
    ]
    if shape.qk_norm:
        found.append(Tensor("query and key before their norms", c * (d + shape.kv), "tp"))
    if shape.dropout:
        found.append(Tensor("dropout", 2 * d, between))
    return found


def selective_tensors(shape: Shape, layout: Layout, habits: Habits = OURS) -> list[Tensor]:
    """What a block keeps with `train.recompute.mode=selective`: its input, and what `habits.kept` names."""
    c, d = layout.width, shape.dim
    stream = 4 if (habits.autocast and layout.mixed) or not layout.mixed else c
    between = "sequence" if layout.sequence_parallel else ""
    table = [
        Tensor("input", stream * d, between),
        Tensor("query", c * d, "tp"),
        Tensor("key", c * shape.kv, "tp"),
        Tensor("value", c * shape.kv, "tp"),
        Tensor("attended", c * d + 4 * shape.heads, "tp"),
        Tensor("proj", c * d, between),
        Tensor("gate", c * shape.ff, "tp"),
        Tensor("up", c * shape.ff, "tp"),
        Tensor("down", c * d, between),
    ]
    return [tensor for tensor in table if tensor.name in ("input", *habits.kept)]


def per_token(tensors: list[Tensor], layout: Layout) -> float:
    """Bytes for a token on one rank."""
    return sum(tensor.bytes / (layout.tp if tensor.along else 1) for tensor in tensors)


def kept_per_token(shape: Shape, layout: Layout, habits: Habits = OURS) -> tuple[float, float]:
    """Bytes for a token that all blocks of one stage keep for a part of a micro-batch, and those of a block recomputed."""
    full = per_token(block_tensors(shape, layout, habits), layout)
    blocks = shape.layers / layout.pp
    if layout.recompute == "none":
        return full * blocks, 0.0
    if layout.recompute == "selective":
        return per_token(selective_tensors(shape, layout, habits), layout) * blocks, full
    held = per_token(block_tensors(shape, layout, habits)[:1], layout)
    again = math.ceil(blocks / layout.every)
    return held * again + full * (blocks - again), full
