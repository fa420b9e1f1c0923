"""Metadata of KFP's ClassificationMetrics: the confusion matrix and the ROC curve of an evaluation folder.

The keys are those of kfp.dsl.ClassificationMetrics, which the UI checks: one number per cell, no null, nothing infinite.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.views.markdown import clean

# More labels than this are no picture any more; the rarer ones are counted as one.
LABELS = 50
# The metadata store takes a few hundred kB; a curve of this many points looks like one of all.
POINTS = 100
_NAME = 60

Matrix = list[list[int]]


def classification(outputs: Mapping[str, Path]) -> dict[str, Any]:
    """`confusionMatrix` and `confidenceMetrics` of an evaluation's classifier, as far as the folder has them.

    Args:
        outputs: the stage's output folders; `evaluation` is read.

    Returns:
        `confusionMatrix`: {"annotationSpecs": [{"displayName"}], "rows": [{"row": [int]}]}, rows the actual labels.
        `confidenceMetrics`: [{"confidenceThreshold", "recall", "falsePositiveRate"}] of the micro-averaged
        one-vs-rest curve, from the highest threshold down. Empty for a language model.
    """
    folder = outputs.get("evaluation")
    if folder is None:
        return {}
    found: dict[str, Any] = {}
    counts = _counts(folder / "predictions.csv")
    if counts:
        names, matrix = confusion(counts)
        found["confusionMatrix"] = {
            "annotationSpecs": [{"displayName": name} for name in names],
            "rows": [{"row": row} for row in matrix],
        }
    points = _points(folder / "roc.csv")
    if points:
        found["confidenceMetrics"] = points
    return found


def confusion(counts: Mapping[tuple[str, str], int], most: int = LABELS) -> tuple[list[str], Matrix]:
    """Names and cells of a confusion matrix of the `most` most frequent labels, in order of their names, and the rest.

    Args:
        counts: (actual, predicted) -> rows.
        most: labels that get a row of their own; with more labels than that the last row is that of the others.
    """
    weight: Counter[str] = Counter()
    for (actual, predicted), rows in counts.items():
        weight[actual] += rows
        weight[predicted] += rows
    ranked = sorted(weight, key=lambda label: (-weight[label], label))
    labels = sorted(ranked[:most])
    place = {label: number for number, label in enumerate(labels)}
    others = len(ranked) - len(labels)
    names = _distinct([*labels, *([f"other ({others:,} labels)"] if others else [])])
    matrix = [[0] * len(names) for _ in names]
    for (actual, predicted), rows in counts.items():
        matrix[place.get(actual, len(labels))][place.get(predicted, len(labels))] += rows
    return names, matrix


def _distinct(names: list[str]) -> list[str]:
    """Names fit to be shown: short, on one line, never empty and never twice the same."""
    seen: set[str] = set()
    found = []
    for name in names:
        short = clean(name, _NAME) or "(empty)"
        shown, copy = short, 1
        while shown in seen:
            copy += 1
            shown = f"{short} ({copy})"
        seen.add(shown)
        found.append(shown)
    return found


def _counts(path: Path) -> Counter[tuple[str, str]]:
    """(actual, predicted) -> rows of predictions.csv; nothing if it is not that of a classifier."""
    found: Counter[tuple[str, str]] = Counter()
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            if next(reader, None) != ["actual", "predicted"]:
                return Counter()
            for row in reader:
                actual, predicted = row
                found[actual, predicted] += 1
    except (OSError, ValueError, csv.Error):
        return Counter()
    return found


def _points(path: Path) -> list[dict[str, float]]:
    """The rows of roc.csv under KFP's names; nothing if one of them is not a finite number."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {
                    "confidenceThreshold": float(row["threshold"]),
                    "recall": float(row["true_positive_rate"]),
                    "falsePositiveRate": float(row["false_positive_rate"]),
                }
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
    return rows[: 2 * POINTS] if all(math.isfinite(value) for row in rows for value in row.values()) else []
