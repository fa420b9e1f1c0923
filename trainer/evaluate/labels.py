"""Judging classifiers: figures on the test split, comparisons, and what the report shows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.evaluate import latency, metrics, score, significance
from trainer.evaluate.baseline import Baseline, label_baselines
from trainer.evaluate.roc import micro_roc
from trainer.evaluate.subjects import Judged, Subject
from trainer.log import say


def judge_labels(params: Params, dataset: Dataset, subjects: Mapping[str, Subject]) -> Judged:
    """Evaluate classifiers of texts or pictures on the test split.

    Raises:
        DataError: the test split is empty.
    """
    split = dataset.split("test")
    evaluate = params.evaluate
    actual = np.asarray(split.labels, np.int64)
    probabilities: dict[str, np.ndarray] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        say(f"testing the {name} on {len(split):,} rows")
        probabilities[name] = score.label_probabilities(subject.predictor, split)
        figures[name] = metrics.classification(actual, probabilities[name], evaluate.bins) | subject.size()
    inputs = _inputs(dataset)
    for name in ("candidate", "teacher"):
        figures[name] |= latency.measure(subjects[name].folder, inputs, evaluate.latency_runs)
    baselines = label_baselines(dataset) if evaluate.baseline else []
    for baseline in baselines:
        figures[_key(baseline, baselines)] = _baseline_figures(baseline, actual, evaluate.bins)
    if baselines:
        probabilities["baseline"] = baselines[0].probabilities
    predicted = {name: found.argmax(axis=1) for name, found in probabilities.items()}
    pairs = {"baseline": ("candidate", "baseline"), "student": ("candidate", "student")}
    pairs |= {"teacher": ("candidate", "teacher"), "student_teacher": ("student", "teacher")}
    comparisons = {
        name: significance.compare_labels(
            actual,
            predicted[first],
            predicted[second],
            dataset.spec.num_labels,
            evaluate.bootstrap,
            evaluate.confidence,
            evaluate.seed,
        )
        for name, (first, second) in pairs.items()
        if second in predicted
    }
    if baselines:
        comparisons["baseline"]["name"] = baselines[0].name
    confusion = metrics.confusion_matrix(actual, predicted["candidate"], dataset.spec.num_labels)
    details = {
        "confusion": confusion,
        "per_class": metrics.per_class(confusion),
        "calibration": metrics.calibration(actual, probabilities["candidate"], evaluate.bins)[1],
        "roc": micro_roc(actual, probabilities["candidate"]),
    }
    names = np.asarray(dataset.labels, dtype=object)
    rows = {
        "id": split.column("id"),
        "actual": names[actual].tolist(),
        "predicted": names[predicted["candidate"]].tolist(),
    }
    rows["score"] = probabilities["candidate"].max(axis=1).round(6).tolist()
    rows |= {name: names[predicted[name]].tolist() for name in ("student", "teacher", "baseline") if name in predicted}
    return Judged("accuracy", figures, comparisons, rows, {}, details)


def _inputs(dataset: Dataset) -> list[Any]:
    """Inputs to time: up to 256 test rows."""
    split = dataset.split("test")
    if dataset.spec.task == "image":
        return list(np.asarray(split.images[:256], np.float32) / 255)
    return split.texts()[:256]


def _key(baseline: Baseline, baselines: list[Baseline]) -> str:
    return "baseline" if baseline is baselines[0] else "most_frequent"


def _baseline_figures(baseline: Baseline, actual: np.ndarray, bins: int) -> dict[str, Any]:
    found = metrics.classification(actual, baseline.probabilities, bins)
    return {"name": baseline.name, **found, "settings": baseline.settings, "seconds": round(baseline.seconds, 3)}
