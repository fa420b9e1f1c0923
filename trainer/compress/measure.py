"""The table of the quantize stage: size, latency, throughput and score of each variant of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trainer.compress.export import INPUT, open_session

if TYPE_CHECKING:
    from trainer.tasks.base import Task

# Both runtimes are timed on one thread: figures of different machines and variants stay comparable.
THREADS = 1
BATCH = 64
SECONDS = 1.5
# Points of the score that an int8 variant may lose before the table says so.
TOLERANCE = 0.5


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        variant: its name.
        bytes: size of its weights file, or of its weights where there is no file.
        ratio: bytes as a share of the fp32 safetensors file.
        latency_p50_ms: median time of one example.
        latency_p99_ms: 99th percentile of it.
        rows_per_s: examples per second in batches of 64.
        score: the task's metric on the validation split.
        lost: score lost against fp32 torch, in points (hundredths) for shares, else in percent of the fp32 score.
        served: whether this variant is model.onnx.
        note: what a reader must know.
    """

    variant: str
    bytes: int
    ratio: float
    latency_p50_ms: float
    latency_p99_ms: float
    rows_per_s: float
    score: float
    lost: float
    served: bool = False
    note: str = ""


class OnnxModule(nn.Module):
    """An ONNX model that a task can evaluate like any other."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.session = open_session(content, THREADS)
        self.device_of = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of tokens or pictures."""
        return torch.from_numpy(self.session.run(None, {INPUT: inputs.numpy()})[0])


def measure(task: Task, model: nn.Module) -> dict[str, float]:
    """Latency, throughput and score of a model on the validation split."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        score = task.evaluate(model, "val")[task.metric]
        count = task.num_examples("val")
        rng = np.random.default_rng(0)
        singles = [task.batch("val", np.asarray([index])) for index in rng.integers(0, count, 32)]
        several = [task.batch("val", rng.integers(0, count, BATCH)) for _ in range(4)]
        times = _time(lambda batch: task.forward(model, batch), singles, most=300)
        batches = _time(lambda batch: task.forward(model, batch), several, most=50)
    finally:
        torch.set_num_threads(before)
    return {
        "score": score,
        "latency_p50_ms": 1e3 * float(np.percentile(times, 50)),
        "latency_p99_ms": 1e3 * float(np.percentile(times, 99)),
        "rows_per_s": BATCH / float(np.median(batches)),
    }


def row(
    name: str, size: int, figures: dict[str, float], fp32: Row | None, metric: str, note: str = "", served: bool = False
) -> Row:
    """A row of the table; `fp32` is the first one, which the others are compared with."""
    lost = points_lost(figures["score"], fp32.score if fp32 else figures["score"], metric)
    if lost > TOLERANCE and name.startswith("int8"):
        note = "; ".join(part for part in (f"loses {lost:.2f} points, more than {TOLERANCE}", note) if part)
    ratio = size / (fp32.bytes if fp32 else size)
    return Row(variant=name, bytes=size, ratio=ratio, lost=lost, served=served, note=note, **figures)


def points_lost(score: float, fp32: float, metric: str) -> float:
    """Score lost: in points for accuracies, in percent of the fp32 value for bits per byte and losses (less is better)."""
    if metric in ("accuracy", "macro_f1"):
        return 100.0 * (fp32 - score)
    return 100.0 * (score - fp32) / fp32 if fp32 else 0.0


def as_json(rows: list[Row], metric: str) -> dict[str, Any]:
    """The content of table.json."""
    return {
        "metric": f"val_{metric}",
        "threads": THREADS,
        "throughput_batch": BATCH,
        "tolerance_points": TOLERANCE,
        "rows": [asdict(each) for each in rows],
    }


def as_text(rows: list[Row], metric: str) -> str:
    """The table for people."""
    head = ("variant", "bytes", "of fp32", "p50 ms", "p99 ms", "rows/s", metric, "lost", "")
    cells = [head]
    for each in rows:
        remark = "; ".join(part for part in ("served" if each.served else "", each.note) if part)
        cells.append(
            (
                each.variant, f"{each.bytes:,}", f"{each.ratio:.3f}", f"{each.latency_p50_ms:.3f}",
                f"{each.latency_p99_ms:.3f}", f"{each.rows_per_s:,.0f}", f"{each.score:.4f}", f"{each.lost:+.2f}", remark,
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
    lines = []
    for line in cells:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        )
        lines.append("  ".join([first, *rest, line[-1]]).rstrip())
    return "\n".join(lines)


def _time(run: Callable[[Any], Any], batches: list[Any], most: int) -> list[float]:
    """Seconds of each of up to `most` runs, at least 10, about `SECONDS` in all; the first runs only warm up."""
    times: list[float] = []
    with torch.inference_mode():
        for batch in batches[:3]:
            run(batch)
        end = time.perf_counter() + SECONDS
        while len(times) < 10 or (len(times) < most and time.perf_counter() < end):
            batch = batches[len(times) % len(batches)]
            start = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - start)
    return times
