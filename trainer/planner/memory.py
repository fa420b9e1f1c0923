"""Memory of one GPU by part, and at its fullest moment.

The fullest moment is one of three: the loss, when all activations are kept and the logits are there; the end of the
backward pass, when all gradients are; the optimizer's step. Parts are those of that moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.parallel.gpus import GIB
from trainer.planner.activations import OURS, Habits, kept_per_token
from trainer.planner.layout import Layout
from trainer.planner.shape import Shape
from trainer.planner.states import state_bytes, step_bytes

# Of the driver, the kernels and the libraries: not seen by torch, but not to be had either.
CONTEXT = 0.6 * GIB
# NCCL's buffers for a group of ranks.
PER_GROUP = 0.3 * GIB
# What the caching allocator holds and cannot use, as a share of what comes and goes.
FRAGMENTED = 0.08
# Bytes of a logit when the gradient of the loss is taken: its log-probability, and two gradients, all float32.
PER_LOGIT = 12.0


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the fullest moment."""

    parts: dict[str, float]
    moment: str

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def memory(shape: Shape, layout: Layout, habits: Habits = OURS, *, gpu: bool = True) -> Memory:
    """Memory of the fullest rank.

    Args:
        shape: the model.
        layout: how it runs.
        habits: how the code behaves.
        gpu: also count what a GPU's driver, libraries and allocator take.
    """
    stages = [_stage(shape, layout, habits, gpu, last) for last in ((False, True) if layout.pp > 1 else (True,))]
    return max(stages, key=lambda found: found.total)


def _stage(shape: Shape, layout: Layout, habits: Habits, gpu: bool, last: bool) -> Memory:
    """Memory of the last stage of the pipeline, or of the first."""
    blocks = shape.layers / layout.pp
    block = shape.block_parameters / layout.tp
    ends = _ends(shape, layout, last)
    local = blocks * block + ends
    lookups = (shape.vocab * (not shape.tied) + shape.bigrams) * shape.dim if not last or layout.pp == 1 else 0
    shards = layout.dp_shard if layout.zero else 1
    block_state, end_state = state_bytes(shape, layout.optimizer)
    end_share = ends / sum(math.prod(each) for each in shape.ends().values())
    state = 0.0 if layout.offload else (blocks * block_state / layout.tp + end_state * end_share) / shards

    tokens = layout.sequences_at_once * shape.length
    kept, again = kept_per_token(shape, layout, habits)
    flight = (1 if last and layout.schedule != "gpipe" else layout.in_flight) if layout.pp > 1 else 1
    activations = kept * tokens * flight
    # In the backward pass: a block's own tensors if they were recomputed, and the gradients of the widest of them.
    moving = (
        again + layout.width * 3 * shape.ff / layout.tp + 8 * shape.dim
    ) * tokens + 4 * shape.ff * shape.dim / layout.tp
    casts = 2 * blocks * block if layout.mixed and habits.autocast else 0.0
    kept_casts = casts if layout.recompute == "none" else 0.0
    logits = _loss(shape, layout, habits, tokens) if last else 0.0

    gathered, whole_gradients = _gathered(layout, habits, local, block, ends)
    whole = 4 * local / (shards if layout.zero > 1 else 1)
    held = whole if layout.accumulation > 1 or layout.parts > 1 else 0.0
    # Before the last block's own gradients, and the embedding's, are there.
    nearly = whole - 4 * (block + lookups) / (shards if layout.zero > 1 else 1)
    divided, undivided = step_bytes(shape, layout.optimizer)
    resident = {
        "parameters": 4 * local / shards,
        "optimizer": state,
        "best weights": 4 * local / shards if habits.copy_of_best else 0.0,
    }
    during = {"gathered weights": gathered, "weights in 16 bits": 0.0}
    moments = {
        "loss": {
            "gradients": held,
            "activations": activations,
            "logits and loss": logits,
            **during,
            "weights in 16 bits": casts,
        },
        "first block backwards": {
            "gradients": max(held, 4 * shape.vocab * shape.dim / layout.tp / shards if last else 0.0),
            "activations": activations + moving,
            **during,
            "weights in 16 bits": kept_casts,
            "buffers": whole_gradients,
        },
        "last block backwards": {
            "gradients": max(held, nearly),
            "activations": moving,
            **during,
            "buffers": whole_gradients,
        },
        "end of the backward pass": {"gradients": whole, **during, "buffers": whole_gradients},
        "optimizer": {
            "gradients": 4 * local / shards,
            "buffers": divided * local / shards / shape.num_parameters + undivided / layout.pp,
        },
    }
    if gpu:
        for parts in moments.values():
            come_and_go = sum(parts.values())
            parts["driver and libraries"] = CONTEXT + PER_GROUP * sum(
                length > 1 for length in (layout.dp_replicate, layout.dp_shard, layout.tp, layout.pp)
            )
            parts["fragmentation"] = FRAGMENTED * come_and_go
    name, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Memory({key: value for key, value in {**resident, **parts}.items() if value}, name)


def _loss(shape: Shape, layout: Layout, habits: Habits, tokens: float) -> float:
    """Bytes at the loss: all logits and their gradients; or some at a time, beside the gradients that they leave."""
    if not habits.logits or (layout.tp > 1 and not shape.tied):
        return PER_LOGIT * shape.vocab * tokens
    rows = min(tokens, max(1, habits.logits // shape.vocab))
    table = shape.vocab * shape.dim
    weights = (4 + layout.width + (2 if layout.mixed else 0)) * table
    return PER_LOGIT * shape.vocab * rows + weights + tokens * shape.dim * 2 * layout.width


def _ends(shape: Shape, layout: Layout, last: bool) -> float:
    """Parameters of a stage that are in no block: the embedding is whole on every rank, an output layer is divided by tp."""
    table, lookups = shape.vocab * shape.dim, (shape.vocab + shape.bigrams) * shape.dim
    head = (0 if shape.tied and layout.pp == 1 else table / (1 if shape.tied else layout.tp)) + shape.dim
    return (head if last else 0) + (lookups if layout.pp == 1 or not last else 0)


def _gathered(layout: Layout, habits: Habits, local: float, block: float, ends: float) -> tuple[float, float]:
    """Bytes of weights that are gathered for a time, and of gradients that are whole until they are divided."""
    if not layout.zero or layout.dp_shard == 1:
        return 0.0, 0.0
    if layout.zero < 3:
        return habits.gathered * local, (habits.gathered + 4) * block if layout.zero == 2 else 0.0
    # This block, the next, and what is outside of the blocks.
    return habits.gathered * (2 * block + ends), (habits.gathered + 4) * block + habits.gathered * ends
