"""The mesh, micro-batch and recomputation that suit a model and its GPUs; what would fit, where nothing does.

All combinations are tried on paper: some thousands, in a fraction of a second. Of those that fit, the one with the most
tokens per second; of two that are within a few per cent of each other, the one with fewer axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from trainer.config import Params
from trainer.config.train import Train
from trainer.errors import ConfigError
from trainer.parallel.gpus import GIB, GPUS, Gpu
from trainer.planner.layout import Layout, global_batch
from trainer.planner.memory import Memory, memory
from trainer.planner.shape import Shape, shape_of
from trainer.planner.states import optimizer_of
from trainer.planner.throughput import FAST, SLOW, Times, step_times
from trainer.plugins import SHARDABLE

MODES = ("none", "selective", "blocks")
# What each further axis must gain to be worth its trouble; the figures of a pipeline are also the least certain.
PER_AXIS = {"dp_replicate": 0.01, "dp_shard": 0.01, "tp": 0.03, "pp": 0.08}
MOST_GPUS = 2**17
# So many larger numbers of nodes are tried one by one for what would fit; above them powers of two, and doublings.
TRIED = 128
NONE = "no number of these GPUs holds this model: make it smaller"


@dataclass(frozen=True)
class Problem:
    """What is asked for.

    Attributes:
        params: the configuration.
        shape: its model.
        gpu: of what kind.
        gpus: how many.
        per_node: how many to a node.
        batch: sequences of a step.
        fixed: keys of params.yaml that must stay as they are, with their values.
    """

    params: Params
    shape: Shape
    gpu: Gpu
    gpus: int
    per_node: int
    batch: int
    fixed: Mapping[str, Any]

    @property
    def train(self) -> Train:
        """Section `train`."""
        return self.params.train


@dataclass(frozen=True)
class Choice:
    """A layout with what it takes."""

    layout: Layout
    memory: Memory
    slow: Times
    fast: Times

    @property
    def score(self) -> float:
        """Sequences per second, less what its axes are not worth."""
        worth = math.prod(1 - share for axis, share in PER_AXIS.items() if getattr(self.layout, axis) > 1)
        pace = math.sqrt(self.slow.total * self.fast.total)
        return self.layout.sequences / pace * worth


def problem_of(
    params: Params, gpu: Gpu, gpus: int, per_node: int, batch: int = 0, fixed: Mapping[str, Any] | None = None
) -> Problem:
    """What a configuration asks of so many GPUs.

    Args:
        params: the configuration.
        gpu: of what kind.
        gpus: how many.
        per_node: how many to a node.
        batch: sequences of a step; 0 takes what the configuration means.
        fixed: keys that must stay as they are.

    Raises:
        ConfigError: the model is none that can be planned for, the GPU cannot compute in `train.precision`, or an axis is
            asked for whose memory and traffic are not known.
    """
    for axis, why in (("cp", "its memory and traffic are not in the figures"), ("ep", "no model family has experts")):
        if getattr(params.parallel, axis) > 1:
            raise ConfigError(
                f"parallel.{axis}: {getattr(params.parallel, axis)}, but it cannot be planned for: {why}",
                f"plan with parallel.{axis}=1",
            )
    precision = params.train.precision
    if precision != "auto" and precision not in gpu.flops:
        able = next(name for name in ("bf16", "fp16", "fp32") if name in gpu.flops)
        raise ConfigError(
            f"train.precision: {precision}, but {gpu.name} has no {precision} kernels", f"use train.precision={able}"
        )
    return Problem(params, shape_of(params), gpu, gpus, per_node, batch or global_batch(params), fixed or {})


def evaluate(problem: Problem, layout: Layout, held: Memory | None = None) -> Choice:
    """What a layout takes."""
    held = held or memory(problem.shape, layout)
    slow, fast = (step_times(problem.shape, layout, problem.gpu, problem.per_node, pace) for pace in (SLOW, FAST))
    return Choice(layout, held, slow, fast)


def fits(problem: Problem, held: Memory) -> bool:
    """Whether it fits into the GPU's memory, or into `train.memory_gb` of it."""
    limit = problem.train.memory_gb * 1e9 or problem.gpu.memory
    return held.total <= min(limit, problem.gpu.memory)


def choices(problem: Problem) -> list[Choice]:
    """All layouts that fit, the best first: of each mesh and recomputation the largest micro-batch that fits."""
    found = []
    for group in _groups(problem):
        for layout in group:
            held = memory(problem.shape, layout)
            if fits(problem, held):
                found.append(evaluate(problem, layout, held))
                break
    return sorted(found, key=lambda choice: -choice.score)


def feasible(problem: Problem) -> bool:
    """Whether any layout fits."""
    return any(fits(problem, memory(problem.shape, group[-1])) for group in _groups(problem))


def smallest(problem: Problem) -> Choice | None:
    """The layout that takes the least memory; None if no mesh divides the model and the batch."""
    last = [group[-1] for group in _groups(problem)]
    if not last:
        return None
    return evaluate(problem, min(last, key=lambda layout: memory(problem.shape, layout).total))


def _groups(problem: Problem) -> Iterator[list[Layout]]:
    """Layouts that differ in their micro-batch only, the largest first, for each mesh and recomputation."""
    train, parallel = problem.train, problem.params.parallel
    base = Layout(
        sequence_parallel=parallel.sequence_parallel, precision=train.precision, optimizer=optimizer_of(train),
        offload=train.offload == "optimizer", compiled=bool(train.compile), schedule=parallel.pipeline.schedule,
    )  # fmt: skip
    for mesh in _meshes(problem, base):
        share, rest = divmod(problem.batch, mesh.copies)
        if rest or not share:
            continue
        for mode in MODES:
            group = [
                layout
                for layout in _batches(replace(mesh, recompute=mode, every=train.recompute.every), share)
                if _keeps(problem.fixed, layout)
            ]
            if group:
                yield group


def _batches(layout: Layout, share: int) -> Iterator[Layout]:
    """Micro-batches of a copy's `share` of a step, the largest first. A pipeline takes all of it at once, in parts."""
    sizes = [size for size in (64, 32, 16, 8, 4, 2, 1) if share % size == 0]
    if layout.pp == 1:
        yield from (replace(layout, batch=size, accumulation=share // size) for size in sizes)
    else:
        yield from (replace(layout, batch=share, parts=share // size) for size in sizes)


def _meshes(problem: Problem, base: Layout) -> Iterator[Layout]:
    """Meshes that divide the GPUs and the model."""
    shape, gpus = problem.shape, problem.gpus
    whole = problem.train.optimizer not in SHARDABLE
    for tp in (1,) if whole else _powers(problem.per_node):
        if any(size % tp for size in (shape.heads, shape.kv_heads, shape.ff, shape.length, gpus)):
            continue
        for pp in _divisors(math.gcd(shape.layers, gpus // tp)):
            data = gpus // tp // pp
            yield replace(base, dp_replicate=data, tp=tp, pp=pp)
            if data == 1 or whole:
                continue
            inside = max(1, problem.per_node // tp)
            shards = {data} | ({inside} if inside > 1 and data % inside == 0 else set())
            for shard in sorted(shards):
                for zero in (1, 2, 3):
                    yield replace(base, dp_replicate=data // shard, dp_shard=shard, tp=tp, pp=pp, zero=zero)


def _keeps(fixed: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a layout has the values that were given; -1 and 0 parts are given up to the search."""
    words = layout.words()
    return all(words.get(key, value) == value for key, value in fixed.items() if value != -1)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


# -- what would fit -----------------------------------------------------------------------------------------------------


def refusal(problem: Problem, tried: Choice | None = None) -> ConfigError:
    """Why nothing fits, and the smallest changes with which something does.

    Args:
        problem: what was asked for.
        tried: the one layout that was asked for; without it, all were tried.
    """
    name = f"{problem.gpus} x {problem.gpu.name}"
    found = tried or smallest(problem)
    if found is None:
        return ConfigError(
            f"{name}: no mesh of {problem.gpus} GPUs divides this model and a step of {problem.batch} sequences"
            + (f" with {_spelled(problem.fixed)}" if problem.fixed else ""),
            "; or ".join(islice(_changes(problem), 3)) or NONE,
        )
    largest = sorted(found.memory.parts.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{part} {size / GIB:,.1f}" for part, size in largest)
    what = "needs" if tried else "at the least it needs"
    fixes = _nearest_changes(problem, tried) if tried else _changes(problem)
    return ConfigError(
        f"{name}: {what} {found.memory.total / GIB:,.1f} GiB on each GPU, which has {problem.gpu.memory / GIB:,.1f} ({parts})",
        "; or ".join(islice(fixes, 3)) or NONE,
    )


def _nearest_changes(problem: Problem, tried: Choice) -> Iterator[str]:
    """Changes with which a layout that was asked for fits, or one near it, or any."""
    if nearest := _nearest(problem, tried.layout):
        yield nearest
    yield from _roomier(problem, lambda other: fits(other, tried.memory))
    free, leave = replace(problem, fixed={}), "leave out --check and the keys of the mesh"
    if feasible(free):
        yield f"{leave}: another one fits"
    else:
        yield from (f"{leave}, and give {change}" for change in _changes(free))


def _nearest(problem: Problem, layout: Layout) -> str:
    """The fewest keys to change for a layout that fits; empty if none does."""
    steps = list(_single(problem, layout))
    pairs = [other for each in steps for other in _single(problem, each)]
    triples = [replace(each, recompute="blocks", every=1) for each in pairs]
    before = layout.words()
    for candidates in (steps, pairs, triples):
        for each in candidates:
            if each.gpus == layout.gpus and fits(problem, memory(problem.shape, each)):
                changed = {key: value for key, value in each.words().items() if before.get(key) != value}
                words = [f"train.offload={'optimizer'}"] if each.offload and not layout.offload else []
                return " ".join([*words, *(f"{key}={value}" for key, value in changed.items())])
    return ""


def _single(problem: Problem, layout: Layout) -> Iterator[Layout]:
    """Layouts one change away that keep the step's sequences, from the cheapest change to the dearest."""
    data, whole = layout.copies, layout.optimizer.name not in SHARDABLE
    for mode in MODES[MODES.index(layout.recompute) + 1 :]:
        yield replace(layout, recompute=mode, every=1)
    for zero in range(layout.zero + 1, 4) if data > 1 and not whole else ():
        yield replace(layout, zero=zero, dp_replicate=1, dp_shard=data)
    if layout.pp == 1:
        for size in _divisors(layout.batch)[-2::-1]:
            yield replace(layout, batch=size, accumulation=layout.accumulation * layout.batch // size)
    for tp in () if whole else _powers(problem.per_node):
        times = tp // layout.tp
        sizes = (problem.shape.heads, problem.shape.kv_heads, problem.shape.ff, problem.shape.length)
        if times > 1 and data % times == 0 and not any(size % tp for size in sizes):
            into = layout.dp_shard % times == 0
            shard, replicate = (layout.dp_shard // times, layout.dp_replicate) if into else (1, data // times)
            yield replace(
                layout, tp=tp, dp_shard=shard, dp_replicate=replicate, accumulation=layout.accumulation * times
            )
    if not layout.offload and not whole:
        yield replace(layout, offload=True)


def _changes(problem: Problem) -> Iterator[str]:
    """Changes of what was asked for with which some layout fits, the smallest first."""
    for key in problem.fixed:
        rest = {other: value for other, value in problem.fixed.items() if other != key}
        if feasible(replace(problem, fixed=rest)):
            yield f"leave out {_spelled({key: problem.fixed[key]})}"
    batch = -(-problem.batch // problem.gpus) * problem.gpus
    other_batch = batch != problem.batch and feasible(replace(problem, batch=batch))
    if other_batch:
        yield f"--global-batch {batch}"
    for gpus in _more_gpus(problem):
        if feasible(replace(problem, gpus=gpus)):
            yield f"--gpus {gpus}"
            break
        if not other_batch and gpus > problem.batch and feasible(replace(problem, gpus=gpus, batch=gpus)):
            yield f"--gpus {gpus} --global-batch {gpus}"
            break
    yield from _roomier(problem, feasible)


def _roomier(problem: Problem, suits: Callable[[Problem], bool]) -> Iterator[str]:
    """The smallest kind of GPU with more memory that suits and computes in the precision asked for, if there is one."""
    able = (gpu for gpu in GPUS.values() if problem.train.precision in (*gpu.flops, "auto"))
    larger = sorted((gpu for gpu in able if gpu.memory > problem.gpu.memory), key=lambda gpu: gpu.memory)
    return islice((f"--gpu {gpu.name}" for gpu in larger if suits(replace(problem, gpu=gpu))), 1)


def _more_gpus(problem: Problem) -> Iterator[int]:
    """Larger numbers of GPUs, growing: those of one node, then whole nodes."""
    node, nodes = problem.per_node, problem.gpus // problem.per_node
    yield from range(problem.gpus + 1, min(node, problem.gpus + TRIED))
    last = nodes + TRIED
    yield from (node * number for number in range(nodes + 1, last + 1))
    doubled = {start * 2**power for start in (1, nodes) for power in range(MOST_GPUS.bit_length())}
    yield from (node * number for number in sorted(doubled) if last < number <= MOST_GPUS // node)


def _spelled(words: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in words.items())
