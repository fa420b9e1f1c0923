"""How fast a served model answers on this machine's CPU: one thread, from text (or pixels) to scores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trainer.predict import Predictor

BATCH = 64
# A slow model is timed fewer times, so that timing never takes longer than this; at least 10 times.
MOST_SECONDS = 6.0


def measure(folder: Path, inputs: Sequence[Any], runs: int) -> dict[str, float]:
    """Latency at batch size 1 and throughput at batch size 64.

    Args:
        folder: model folder.
        inputs: texts, or pictures as float32 (channels, size, size).
        runs: timed predictions at batch size 1, after 5 that are not counted.

    Returns:
        `latency_p50_ms`, `latency_p99_ms`, `throughput_per_s` (inputs per second).
    """
    from trainer.predict import Predictor

    predictor = Predictor(folder, threads=1)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at each call: the tokenizer too keeps to one thread
    try:
        return _measure(predictor, inputs, runs)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _measure(predictor: Predictor, inputs: Sequence[Any], runs: int) -> dict[str, float]:

    def answer(batch: Sequence[Any]) -> None:
        images = predictor.spec.task == "image"
        predictor.logits(np.stack(list(batch)) if images else predictor.encode(list(batch)))

    singles = [[inputs[i % len(inputs)]] for i in range(runs)]
    many = [[inputs[(k * BATCH + i) % len(inputs)] for i in range(BATCH)] for k in range(5)]
    once = _times(answer, singles, MOST_SECONDS)
    batches = _times(answer, many, MOST_SECONDS / 2)
    p50, p99 = np.percentile(once, [50, 99])
    return {
        "latency_p50_ms": 1000 * float(p50),
        "latency_p99_ms": 1000 * float(p99),
        "throughput_per_s": BATCH / float(np.median(batches)),
    }


def _times(run: Callable[[Sequence[Any]], None], batches: Sequence[Sequence[Any]], most: float) -> list[float]:
    """Seconds of each batch, after a few that only warm up; no more batches are begun when `most` seconds are over."""
    for batch in batches[: min(5, len(batches))]:
        run(batch)
    times: list[float] = []
    end = time.perf_counter() + most
    for batch in batches:
        start = time.perf_counter()
        run(batch)
        times.append(time.perf_counter() - start)
        if time.perf_counter() > end and len(times) >= min(10, len(batches)):
            break
    return times
