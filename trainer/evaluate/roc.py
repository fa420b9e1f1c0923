"""The ROC curve of a classifier: micro-averaged, one label against the rest, in numpy."""

from __future__ import annotations

import numpy as np

# Scores are taken to this many steps, as finely as predictions.parquet has them.
STEPS = 1_000_000
POINTS = 100
_CELLS = 4_000_000


def micro_roc(actual: np.ndarray, probabilities: np.ndarray, points: int = POINTS) -> list[tuple[float, float, float]]:
    """The curve of all (row, label) pairs: positive where the label is the row's, scored by its probability.

    Equal to scikit-learn's `roc_curve` of the flattened arrays at its thresholds; of more than `points` thresholds those
    are kept that divide the length of the curve evenly. Counted in bins, so memory does not grow with the rows.

    Args:
        actual: labels, int (rows), each below the number of labels.
        probabilities: (rows, labels).
        points: most points.

    Returns:
        (threshold, false positive rate, true positive rate), from a threshold above all scores, where nothing is
        positive, down to the lowest, where everything is; empty if there are no rows or there is just one label.
    """
    rows, labels = probabilities.shape
    if not rows or labels < 2:
        return []
    every, hits = np.zeros(STEPS + 1, np.int64), np.zeros(STEPS + 1, np.int64)
    block = max(1, _CELLS // labels)
    for start in range(0, rows, block):
        scores = np.rint(probabilities[start : start + block] * STEPS).astype(np.int64).clip(0, STEPS)
        every += np.bincount(scores.ravel(), minlength=STEPS + 1)
        own = scores[np.arange(len(scores)), actual[start : start + block]]
        hits += np.bincount(own, minlength=STEPS + 1)
    used = np.flatnonzero(every)[::-1]
    true = np.cumsum(hits[used]) / rows
    false = np.cumsum((every - hits)[used]) / (rows * (labels - 1))
    length = true + false
    kept = np.unique(np.searchsorted(length, np.linspace(0, 2, points - 1)[1:]).clip(0, len(used) - 1))
    curve = [((int(used[0]) + 1) / STEPS, 0.0, 0.0)]
    return curve + [(int(used[i]) / STEPS, float(false[i]), float(true[i])) for i in kept]
