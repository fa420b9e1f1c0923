"""Scalars of a stage under names that stay the same from run to run, for the comparison of runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.storage import read_json
from trainer.views.facts import open_manifest

# Whose figures an evaluation holds.
WHO = ("candidate", "student", "teacher", "baseline", "most_frequent", "xz")


def metrics(stage: str, metrics: Mapping[str, float], outputs: Mapping[str, Path] | None = None) -> dict[str, float]:
    """Flat finite numbers; the unit is part of a name (`bytes`, `_ms`, `_per_s`, `seconds`), shares and scores have none.

    Args:
        stage: a name of `trainer.stage.STAGES`.
        metrics: what the stage returned.
        outputs: its output folders; those of evaluate hold the figures of the baseline, the teacher and the champion.
    """
    outputs = outputs or {}
    found = dict(_finite("candidate_" if stage == "evaluate" else "", metrics))
    if stage == "evaluate" and "evaluation" in outputs:
        found |= _evaluation(read_json(outputs["evaluation"] / "metrics.json"))
    if stage == "preprocess" and "dataset" in outputs:
        made = open_manifest(outputs["dataset"])
        meta = made.meta if made else {}
        found |= _finite("rows_", _mapping(meta.get("rows")))
        found |= _finite("", {"labels": len(_mapping(meta.get("label_counts")))})
    return found


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """`candidate_accuracy`, `baseline_accuracy`, `champion_accuracy`, `p_value_baseline`, `promoted`, ..."""
    found: dict[str, float] = {}
    for who in WHO:
        found |= _finite(f"{who}_", _mapping(evaluation.get(who)))
    champion = _mapping(evaluation.get("champion"))
    # Both on the champion's own test set, which is not this run's.
    for who in ("candidate", "champion"):
        found |= _finite(f"champion_test_{who}_", _mapping(champion.get(who)))
    for other, comparison in (("baseline", evaluation.get("comparison")), ("champion", champion)):
        found |= _finite("", {f"p_value_{other}": _mapping(comparison).get("p_value")})
    folds = _mapping(evaluation.get("cross_validation"))
    found |= _finite("folds_", {key: folds.get(key) for key in ("accuracy", "std")})
    found |= _finite("code_", {key: _mapping(evaluation.get("code")).get(key) for key in ("valid", "exact")})
    found |= _finite("", {"test_rows": evaluation.get("test_rows")})
    gate = _mapping(evaluation.get("gate"))
    if gate.get("decision"):
        found["promoted"] = float(gate["decision"] == "promoted")
    return found


def _finite(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
