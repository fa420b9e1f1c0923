"""The models under test, and what was found out about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.artifacts.dataset import Dataset
from trainer.errors import ArtifactError
from trainer.predict import Predictor, served_bytes
from trainer.stage import Call

# Name under test -> input of the stage.
PORTS = {"candidate": "quantized", "student": "student", "teacher": "model"}
# Figures that differ between runs with the same inputs.
_TIMES = ("latency_p50_ms", "latency_p99_ms", "throughput_per_s", "seconds")


@dataclass(frozen=True)
class Subject:
    """A model under test."""

    name: str
    folder: Path
    predictor: Predictor

    def size(self) -> dict[str, Any]:
        """`bytes` of its served weights and `num_parameters`."""
        import json

        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return {"bytes": served_bytes(self.folder), "num_parameters": int(config["num_parameters"])}


@dataclass
class Judged:
    """What was found out.

    Attributes:
        metric: the headline metric: `accuracy` or `bits_per_byte`.
        figures: name (candidate, student, teacher, baseline, ...) -> its figures.
        comparisons: other -> comparison of the candidate with it; `student_teacher` compares these two.
        rows: columns of predictions.parquet, all of one length.
        code: `trainer.evaluate.codecheck.check`, for language models of Python.
        details: what the report and the curves show: `confusion`, `per_class`, `calibration`, `roc`.
    """

    metric: str
    figures: dict[str, dict[str, Any]]
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    code: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def steady(self) -> dict[str, dict[str, Any]]:
        """The figures without times."""
        return {
            name: {key: value for key, value in figures.items() if key not in _TIMES}
            for name, figures in self.figures.items()
        }


def open_subjects(call: Call, dataset: Dataset) -> Mapping[str, Subject]:
    """Candidate, student and teacher, by name.

    Raises:
        ArtifactError: a model is for another task, or was made with other labels, than the dataset.
    """
    subjects = {}
    for name, port in PORTS.items():
        predictor = Predictor(call.inputs[port])
        if predictor.spec.task != dataset.spec.task or list(predictor.labels) != list(dataset.labels):
            raise ArtifactError(
                f"{call.inputs[port]}: was made for other data (task {predictor.spec.task}, {len(predictor.labels)} labels)"
                f" than {dataset.folder} (task {dataset.spec.task}, {len(dataset.labels)} labels)",
                "run the stages that lead here again, with one dataset",
            )
        subjects[name] = Subject(name, call.inputs[port], predictor)
    return subjects


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as JSON values."""
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
