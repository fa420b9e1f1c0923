"""Is the difference between two models on the same test set more than chance? Paired tests, exact or by resampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.evaluate.metrics import macro_f1_samples

# Cells (resamples x rows) of one block of resamples: bounds the memory.
_BLOCK_CELLS = 4_000_000


@dataclass(frozen=True)
class Difference:
    """A difference candidate - other with its confidence interval; positive means that the value is higher."""

    value: float
    low: float
    high: float

    def plain(self) -> dict[str, float]:
        """As JSON values."""
        return asdict(self)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[float, int, int]:
    """Exact McNemar test (McNemar 1947): two-sided binomial test on the rows where just one of two models is right.

    Args:
        first: bool (rows), whether the first model is right.
        second: bool (rows), whether the second is.

    Returns:
        The p-value, the rows that only the first got right, and those that only the second did. Without any such row
        the p-value is 1.
    """
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    number, fewer = only_first + only_second, min(only_first, only_second)
    if number == 0:
        return 1.0, 0, 0
    logs = [
        math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) - number * math.log(2)
        for k in range(fewer + 1)
    ]
    largest = max(logs)
    tail = math.exp(largest) * math.fsum(math.exp(value - largest) for value in logs)
    return min(1.0, 2 * tail), only_first, only_second


def compare_labels(
    actual: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    num_labels: int,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Compare the predictions of two classifiers on the same rows.

    Args:
        actual: labels (rows).
        first: predicted labels of the candidate (rows).
        second: predicted labels of the other (rows).
        num_labels: number of labels.
        resamples: resamples of the paired bootstrap (Efron 1979), for the intervals.
        confidence: level of the intervals.
        seed: seed of the resampling.

    Returns:
        `test`, `p_value` (two-sided, of accuracy), `only_candidate` and `only_other` (rows that just one got right), and
        `accuracy` and `macro_f1`: each a difference with `low` and `high`.
    """
    right, other = first == actual, second == actual
    p_value, only_first, only_second = mcnemar(right, other)
    gain = right.astype(np.float64) - other
    accuracies, macros = [], []
    for counts in _resamples(len(actual), resamples, seed):
        accuracies.append(counts @ gain / len(actual))
        macros.append(
            macro_f1_samples(actual, first, counts, num_labels) - macro_f1_samples(actual, second, counts, num_labels)
        )
    once = np.ones((1, len(actual)))
    macro = (
        macro_f1_samples(actual, first, once, num_labels) - macro_f1_samples(actual, second, once, num_labels)
    ).item()
    return {
        "test": "exact McNemar",
        "p_value": p_value,
        "only_candidate": only_first,
        "only_other": only_second,
        "accuracy": interval(float(gain.mean()), np.concatenate(accuracies), confidence).plain(),
        "macro_f1": interval(macro, np.concatenate(macros), confidence).plain(),
        "confidence": confidence,
        "rows": len(actual),
    }


def compare_bits(
    first: np.ndarray, second: np.ndarray, num_bytes: np.ndarray, resamples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Compare two language models on the same documents: paired bootstrap over documents on bits per byte.

    Args:
        first: bits of each document under the candidate (documents).
        second: bits of each document under the other (documents).
        num_bytes: size of each document (documents).
        resamples: resamples.
        confidence: level of the interval.
        seed: seed of the resampling.

    Returns:
        `test`, `p_value` (two-sided; never below 2 / (resamples + 1), as resampling cannot show less), and
        `bits_per_byte`: the difference (negative: the candidate is better) with `low` and `high`.
    """
    gain = first - second
    values = np.concatenate(
        [counts @ gain / np.maximum(counts @ num_bytes, 1) for counts in _resamples(len(first), resamples, seed)]
    )
    value = float(gain.sum() / max(num_bytes.sum(), 1))
    tail = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return {
        "test": "paired bootstrap over documents",
        "p_value": min(1.0, 2 * (tail + 1) / (len(values) + 1)),
        "bits_per_byte": interval(value, values, confidence).plain(),
        "confidence": confidence,
        "rows": len(first),
    }


def interval(value: float, samples: np.ndarray, confidence: float) -> Difference:
    """A value with the percentile interval of its resamples."""
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(value, float(low), float(high))


def _resamples(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (resamples, rows) of how often each row is drawn, when `rows` rows are drawn with replacement."""
    random = np.random.default_rng(seed)
    block = max(1, min(resamples, _BLOCK_CELLS // max(rows, 1)))
    for start in range(0, resamples, block):
        yield _counts(random, rows, min(block, resamples - start))


def _counts(random: np.random.Generator, rows: int, resamples: int) -> np.ndarray:
    drawn = random.integers(rows, size=(resamples, rows))
    cells = np.bincount((drawn + np.arange(resamples)[:, None] * rows).ravel(), minlength=resamples * rows)
    return cells.reshape(resamples, rows).astype(np.float64)
