"""Figures of a classifier from its probabilities, in numpy. The definitions are scikit-learn's; tests compare them."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64, computed without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def confusion_matrix(actual: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Counts, int64 (num_labels, num_labels): rows are the actual labels, columns the predicted ones."""
    cells = np.bincount(actual.astype(np.int64) * num_labels + predicted, minlength=num_labels**2)
    return cells.reshape(num_labels, num_labels)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """`precision`, `recall`, `f1` (0 where undefined) and `support` of each label."""
    hits = confusion.diagonal().astype(np.float64)
    predicted, actual = confusion.sum(axis=0), confusion.sum(axis=1)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, actual),
        "f1": _ratio(2 * hits, predicted + actual),
        "support": actual,
    }


def accuracy(confusion: np.ndarray) -> float:
    """Share of rows on the diagonal."""
    return float(confusion.trace() / max(confusion.sum(), 1))


def macro_f1(confusion: np.ndarray) -> float:
    """Mean F1 over the labels that occur, as actual or as predicted."""
    occurs = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
    return float(per_class(confusion)["f1"][occurs].mean()) if occurs.any() else 0.0


def macro_f1_samples(actual: np.ndarray, predicted: np.ndarray, weights: np.ndarray, num_labels: int) -> np.ndarray:
    """Macro-F1 of many resamples at once.

    Args:
        actual: labels (rows).
        predicted: labels (rows).
        weights: how often each row is in each resample (resamples, rows).
        num_labels: number of labels.

    Returns:
        float64 (resamples).
    """
    right = np.flatnonzero(actual == predicted)
    hit_labels = actual[right]
    found = np.empty(len(weights))
    # One resample at a time: counting needs memory for a row of weights and for the labels, not for their product.
    for i, counts in enumerate(weights):
        hits = np.bincount(hit_labels, counts[right], num_labels)
        total = np.bincount(actual, counts, num_labels) + np.bincount(predicted, counts, num_labels)
        occurs = total > 0
        found[i] = (2 * hits[occurs] / total[occurs]).sum() / max(int(occurs.sum()), 1)
    return found


def calibration(actual: np.ndarray, probabilities: np.ndarray, bins: int) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks") and its bins.

    Args:
        actual: labels (rows).
        probabilities: (rows, labels).
        bins: number of bins of equal width over the confidence, the probability of the predicted label.

    Returns:
        The error, and for each bin that is not empty: `low`, `high`, `rows`, `confidence` and `accuracy` (means).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == actual
    # A bin holds low < confidence <= high, as in the paper.
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    error, found = 0.0, []
    for number in range(bins):
        inside = place == number
        rows = int(inside.sum())
        if rows:
            mean, share = float(confidence[inside].mean()), float(correct[inside].mean())
            error += rows / len(actual) * abs(mean - share)
            found.append(
                {"low": number / bins, "high": (number + 1) / bins, "rows": rows, "confidence": mean, "accuracy": share}
            )
    return error, found


def classification(actual: np.ndarray, probabilities: np.ndarray, bins: int) -> dict[str, float]:
    """`accuracy`, `macro_f1`, `ece` and `loss` (mean negative log-likelihood, nats) of a classifier's probabilities.

    A label of -1 in `actual` (one that the classifier does not know) counts as wrong.
    """
    num_labels = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    known = actual >= 0
    # Rows of unknown labels go to a label of their own, which is never predicted.
    confusion = confusion_matrix(np.where(known, actual, num_labels), predicted, num_labels + 1)
    likelihood = probabilities[np.arange(len(actual)), np.maximum(actual, 0)] * known
    return {
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "ece": calibration(actual, probabilities, bins)[0],
        "loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(above, below, out=np.zeros(len(above)), where=below > 0))
