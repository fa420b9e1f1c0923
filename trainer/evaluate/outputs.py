"""The tables of an evaluation: predictions as Parquet, and CSV files that `dvc plots show` draws."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.artifacts.dataset import Dataset
from trainer.evaluate.subjects import Judged


def write_tables(out: Path, judged: Judged, dataset: Dataset, inputs: Mapping[str, Path]) -> None:
    """Write predictions.parquet, predictions.csv, learning.csv and, for classifiers, roc.csv."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(judged.rows), out / "predictions.parquet")
    if "actual" in judged.rows:
        _write_csv(
            out / "predictions.csv",
            ("actual", "predicted"),
            zip(judged.rows["actual"], judged.rows["predicted"], strict=True),
        )
    else:
        share = [bits / size for bits, size in zip(judged.rows["bits_candidate"], judged.rows["bytes"], strict=True)]
        _write_csv(out / "predictions.csv", ("document", "bits_per_byte"), enumerate(share))
    if judged.details.get("roc"):
        _write_csv(out / "roc.csv", ("threshold", "false_positive_rate", "true_positive_rate"), judged.details["roc"])
    rows = []
    for name in ("model", "student"):
        for row in history(inputs[name]):
            rows.append({"model": "teacher" if name == "model" else name, **row})
    keys = list(dict.fromkeys(["model", "step", *(key for row in rows for key in row)]))
    _write_csv(out / "learning.csv", keys, ([row.get(key, "") for key in keys] for row in rows))


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a model folder's history.jsonl; none if it has none."""
    path = folder / "history.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write_csv(path: Path, head: Any, rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
