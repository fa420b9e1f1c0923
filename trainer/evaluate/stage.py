"""Stage evaluate: test what would be served beside a baseline, the teacher, the student and the champion.

metrics.json         all figures, the comparisons and the gate's decision
scores.json          the part of it that is the same in every run with the same inputs
predictions.parquet  every test row: what was right, what each model said
predictions.csv      actual,predicted           for `dvc plots show` (confusion matrix)
roc.csv              threshold,false_positive_rate,true_positive_rate of a classifier, micro-averaged over its labels
learning.csv         model,step and figures     for `dvc plots show` (learning curves)
report.html          the whole run on one page
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.evaluate import champion, gate, outputs
from trainer.evaluate.labels import judge_labels
from trainer.evaluate.language import judge_language
from trainer.evaluate.subjects import Judged, open_subjects
from trainer.log import say
from trainer.stage import Call, Result

VOLATILE = ("metrics.json", "report.html")


def run(call: Call) -> Result:
    """Evaluate, decide, and write the report.

    Raises:
        DataError: the test split is empty.
        ArtifactError: a model cannot be read, or does not fit the dataset.
    """
    out, params = call.outputs["evaluation"], call.params
    dataset = Dataset(call.inputs["dataset"])
    subjects = open_subjects(call, dataset)
    judge = judge_language if dataset.spec.task == "lm" else judge_labels
    judged: Judged = judge(params, dataset, subjects)
    digests = {name: manifest.read(call.inputs[name], verify=False).digest for name in call.inputs}
    judged.figures["candidate"]["digest"] = digests["quantized"]
    with tempfile.TemporaryDirectory(prefix="millrace-") as cache:
        rival = champion.compare(params, dataset, call.inputs["quantized"], digests["quantized"], Path(cache))
    against = judged.comparisons.get("baseline")
    decision = gate.decide(params.promote, judged.figures["candidate"], against, rival)
    folds = _cross_validate(call, dataset)
    metrics: dict[str, Any] = {
        "baseline": {"name": "none"},
        **judged.figures,
        "comparison": against or {},
        "comparisons": {name: value for name, value in judged.comparisons.items() if name != "baseline"},
        **({"champion": rival} if rival else {}),
        **({"cross_validation": folds} if folds else {}),
        **({"code": judged.code} if judged.code else {}),
        "test_rows": len(dataset.split("test")),
        "data_version": str(dataset.meta.get("data_version", "")),
        "gate": decision.plain(),
    }
    scores = {"figures": judged.steady(), "comparisons": judged.comparisons, "cross_validation": folds}
    _write(out / "metrics.json", metrics)
    _write(out / "scores.json", scores)
    outputs.write_tables(out, judged, dataset, call.inputs)
    from trainer.evaluate import report

    page = report.build(call, dataset, judged, metrics)
    (out / "report.html").write_text(page, encoding="utf-8")
    _say(metrics, judged.metric)
    meta = {
        "candidate": digests["quantized"],
        "dataset": digests["dataset"],
        "teacher": digests["model"],
        "student": digests["student"],
        "data_version": metrics["data_version"],
    }
    flat = {name: float(value) for name, value in metrics["candidate"].items() if isinstance(value, (int, float))}
    return Result(metrics=flat, meta={"evaluation": meta}, volatile=VOLATILE)


def _cross_validate(call: Call, dataset: Dataset) -> dict[str, Any]:
    """Mean and standard deviation of the accuracy over `evaluate.folds` folds; empty if there are none to make.

    The parameters are those of params.yaml, not the best of the search: that has seen the rows that are held out here.
    """
    params = call.params
    if not params.evaluate.folds or dataset.spec.task == "lm":
        return {}
    from statistics import fmean, stdev

    from trainer.train.crossval import cross_validate

    scores = [float(value) for value in cross_validate(params, dataset, params.evaluate.folds)]
    spread = stdev(scores) if len(scores) > 1 else 0.0
    say(f"cross-validation, {len(scores)} folds: accuracy {fmean(scores):.4f} +- {spread:.4f}")
    return {"folds": len(scores), "accuracy": fmean(scores), "std": spread, "accuracies": scores}


def _say(metrics: dict[str, Any], metric: str) -> None:
    for name in ("teacher", "student", "candidate", "baseline"):
        figures = metrics.get(name)
        if figures and metric in figures:
            title = f"{name} ({figures['name']})" if "name" in figures else name
            shown = {key: figures[key] for key in (metric, "macro_f1", "bytes", "latency_p50_ms") if key in figures}
            say(f"test, {title}", **shown)
    say(f"gate: {metrics['gate']['decision']}: {metrics['gate']['reason']}")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
