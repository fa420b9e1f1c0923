"""Seconds that training stops to save a state of 604 MB: `python benchmarks/checkpoint.py [--steps 5]`

Beside it, in turn: `torch.distributed.checkpoint.async_save` with its defaults, and the floor, a copy of each tensor into
memory that was touched before. Each save is finished before the next begins; the first of each, which also makes buffers
and plans, is printed apart. Tensors are those of a GPT of 50.3 M parameters in fp32, with AdamW's two moments.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from trainer.parallel.group import Ranks
from trainer.train.checkpoint import Checkpoints

WIDTH, LAYERS, WORDS = 640, 8, 17_130


def state() -> dict[str, dict[str, Tensor]]:
    """Parameters and two moments of each: 604 MB."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        for name, rows in (("query", 1), ("key", 1), ("value", 1), ("output", 1), ("up", 4), ("down", 4)):
            shapes[f"blocks.{layer}.{name}"] = (rows * WIDTH, WIDTH)
            shapes[f"blocks.{layer}.{name}.bias"] = (rows * WIDTH,)
    return {
        part: {name: torch.randn(shape) for name, shape in shapes.items()}
        for part in ("model", "exp_avg", "exp_avg_sq")
    }


def floor(tree: dict[str, dict[str, Tensor]]) -> Callable[[int], float]:
    """A plain copy of each tensor."""
    pairs = [(torch.zeros_like(tensor), tensor) for part in tree.values() for tensor in part.values()]

    def copy(step: int) -> float:
        start = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        return time.perf_counter() - start

    return copy


def ours(tree: dict[str, Any], place: Path) -> Callable[[int], float]:
    """`Checkpoints.save`; what it has started is waited for outside of the time."""
    kept = Checkpoints(place, 1, Ranks(), "benchmark", keep_best=False)

    def save(step: int) -> float:
        start = time.perf_counter()
        kept.save(step, tree, {})
        stop = time.perf_counter() - start
        kept.settle()
        return stop

    return save


def peer(tree: dict[str, Any], place: Path) -> Callable[[int], float]:
    """`dcp.async_save`; what it has started is waited for outside of the time."""

    def save(step: int) -> float:
        start = time.perf_counter()
        future: Any = async_save(tree, storage_writer=FileSystemWriter(place / "peer"))
        stop = time.perf_counter() - start
        getattr(future, "upload_completion", future).result()
        return stop

    return save


def main() -> None:
    """Print minimum, median and maximum of each, and ratios to the floor of the same round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="saves of each (default: 5)")
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore")
    tree = state()
    size = sum(tensor.nbytes for part in tree.values() for tensor in part.values())
    with tempfile.TemporaryDirectory(prefix="millrace-checkpoint-") as folder:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        ways = {
            "copy floor": floor(tree),
            "millrace": ours(tree, Path(folder) / "ours"),
            "dcp.async_save": peer(tree, Path(folder)),
        }
        first = {name: way(0) for name, way in ways.items()}
        rounds = [{name: way(step) for name, way in ways.items()} for step in range(1, steps + 1)]
        dist.destroy_process_group()
    print(f"{size / 1e6:.0f} MB, {torch.get_num_threads()} threads, {steps} saves of each")
    for name in ways:
        times = sorted(row[name] for row in rounds)
        ratios = sorted(row[name] / row["copy floor"] for row in rounds)
        print(
            f"{name:<15} stop {times[0]:.3f} / {statistics.median(times):.3f} / {times[-1]:.3f} s   x floor "
            f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}   first {first[name]:.3f} s"
        )


if __name__ == "__main__":
    main()
