"""Seconds of a step and tokens per second, as a range: from kernels and connections as they often are, to as they can be.

A step is the products of matrices at a share of the GPU's peak, attention at a lower one, reads and writes of everything
else at the memory's bandwidth, transfers as far as nothing hides them, and the pipeline's idle time. The shares are
fitted to published runs, which tests/unit/test_planner_figures.py lists.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.parallel.gpus import Gpu
from trainer.planner.activations import OURS, Habits, block_tensors, per_token
from trainer.planner.layout import Layout
from trainer.planner.shape import Shape
from trainer.planner.states import state_bytes


@dataclass(frozen=True)
class Pace:
    """Shares of a datasheet's figures that a run reaches.

    Attributes:
        products: of the peak, in products of matrices.
        attention: of the peak, in attention.
        traffic: how often what a block keeps passes between memory and cores, forward and backward, if it is compiled.
        eager: the same if it is not.
        bandwidth: of the memory's bandwidth.
        link: of the connections' bandwidth.
        hidden: of a transfer that has computation beside it, what is hidden.
    """

    products: float
    attention: float
    traffic: float
    eager: float
    bandwidth: float
    link: float
    hidden: float


SLOW = Pace(products=0.4, attention=0.2, traffic=5.0, eager=9.0, bandwidth=0.7, link=0.5, hidden=0.5)
FAST = Pace(products=0.66, attention=0.45, traffic=3.0, eager=5.0, bandwidth=0.9, link=0.85, hidden=0.95)


@dataclass(frozen=True)
class Times:
    """Seconds of a step on the slowest rank, by what takes them."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def step_times(shape: Shape, layout: Layout, gpu: Gpu, per_node: int, pace: Pace, habits: Habits = OURS) -> Times:
    """Seconds of a step.

    Args:
        shape: the model.
        layout: how it runs.
        gpu: of what kind.
        per_node: GPUs of a node.
        pace: how much of the datasheet is reached.
        habits: how the code behaves.
    """
    rounds = layout.accumulation
    tokens = layout.batch * shape.length  # of a micro-batch, all parts together
    blocks, split = shape.layers / layout.pp, layout.tp
    peak = peak_of(gpu, layout.precision)
    again = {"none": 0.0, "selective": 0.1, "blocks": 1.0 / layout.every}[layout.recompute]
    head = 3 * shape.head_flops / (split if not shape.tied else 1) / layout.pp
    products = (blocks * shape.block_flops / split * (3 + again) + head) * tokens / (peak * pace.products)
    # A token sees half of the others; the backward pass makes five products of attention for the forward pass's two.
    attention = blocks * shape.attention_flops / 2 / split * (3.5 + again) * tokens / (peak * pace.attention)
    often = pace.traffic if layout.compiled else pace.eager
    moved = per_token(block_tensors(shape, layout, habits), layout) * blocks * often * (1 + again / 3)
    moved += 30.0 * shape.vocab / layout.pp
    memory = moved * tokens / (gpu.bandwidth * pace.bandwidth)
    computed = products + attention + memory

    exposed, once = _transfers(shape, layout, gpu, per_node, pace, habits, computed)
    idle = (layout.pp - 1) / layout.parts * (computed + exposed["tensor parallel"])
    shards = layout.dp_shard if layout.zero else 1
    local = shape.num_parameters / layout.tp / layout.pp / shards
    state = sum(
        size * times for size, times in zip(state_bytes(shape, layout.optimizer), (shape.layers, 1), strict=True)
    )
    touched = 2 * (12 * local + state / layout.tp / layout.pp / shards)
    slow = 32e9 if layout.offload else gpu.bandwidth * pace.bandwidth
    parts = {
        "products of matrices": rounds * products,
        "attention": rounds * attention,
        "memory traffic": rounds * memory,
        **{name: rounds * seconds for name, seconds in exposed.items()},
        "pipeline idle": rounds * idle,
        "gradients over replicas": once,
        "optimizer": touched / slow,
    }
    return Times({name: seconds for name, seconds in parts.items() if seconds})


def peak_of(gpu: Gpu, precision: str) -> float:
    """Peak FLOP/s in the precision that is planned for; `auto` means the fastest of 16 or 32 bits."""
    if precision == "auto":
        return max(gpu.flops.get(name, 0.0) for name in ("bf16", "fp16", "fp32"))
    return gpu.flops[precision]


def bus(gpu: Gpu, ranks: int, stride: int, per_node: int) -> float:
    """Bytes/s of a collective of `ranks` that are `stride` ranks apart: NVLink inside a node, else the node's cards.

    A ring over nodes uses as many network cards as it has ranks on each node.
    """
    inside = max(1, min(ranks, per_node // stride)) if stride < per_node else 1
    return gpu.link if inside >= ranks else min(gpu.link, inside * gpu.network)


def _transfers(
    shape: Shape, layout: Layout, gpu: Gpu, per_node: int, pace: Pace, habits: Habits, computed: float
) -> tuple[dict[str, float], float]:
    """Seconds of a micro-batch that transfers add, by kind, and those once a step."""
    local = 4.0 * shape.num_parameters / layout.tp / layout.pp
    tokens = layout.batch * shape.length
    found = {"tensor parallel": 0.0}
    if layout.tp > 1:
        # A block gathers twice and scatters twice, forward and backward; recomputation once more forward.
        times = 8 + (4 if layout.recompute == "blocks" else 0) + 2
        volume = times * shape.layers / layout.pp * tokens * shape.dim * layout.width * (layout.tp - 1) / layout.tp
        found["tensor parallel"] = volume / (bus(gpu, layout.tp, 1, per_node) * pace.link)
    stride = layout.tp
    if layout.zero and layout.dp_shard > 1:
        # Whatever is not kept whole until the step ends is transferred for each part of a micro-batch.
        gathers = (2 * layout.parts if layout.zero == 3 else 1 / layout.accumulation) * habits.gathered / 4
        scatters = 1 / layout.accumulation if layout.zero == 1 else layout.parts
        volume = (gathers + scatters) * local * (layout.dp_shard - 1) / layout.dp_shard
        seconds = volume / (bus(gpu, layout.dp_shard, stride, per_node) * pace.link)
        found["sharded weights"] = _shown(seconds, computed, pace)
    if layout.pp > 1:
        volume = 2 * tokens * shape.dim * 4 / (layout.tp if layout.sequence_parallel else 1)
        found["pipeline transfers"] = volume / (gpu.network * pace.link) * (1 - pace.hidden)
    once = 0.0
    if layout.dp_replicate > 1:
        share = local / (layout.dp_shard if layout.zero else 1)
        group = bus(gpu, layout.dp_replicate, stride * layout.dp_shard, per_node)
        # Gradients are summed after the last backward pass, not beside it, where nothing is sharded.
        seconds = 2 * share * (layout.dp_replicate - 1) / layout.dp_replicate / (group * pace.link)
        once = _shown(seconds, computed, pace) if layout.zero else seconds
    return found, once


def _shown(seconds: float, computed: float, pace: Pace) -> float:
    """What is left of a transfer that may hide behind computation."""
    return max(seconds * (1 - pace.hidden), seconds - pace.hidden * computed)
