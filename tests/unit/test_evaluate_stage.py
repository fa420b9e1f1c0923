"""Stage evaluate on small real models: what it writes, what it decides, and that a rerun gives the same digest."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.errors import ArtifactError, GateRefused
from trainer.registry import Registry
from trainer.stage import execute
from trainer.train.fit import fit

QUICK = ["evaluate.bootstrap=200", "evaluate.latency_runs=10", "evaluate.examples=3", "promote.model=m"]
FAMILIES = {
    "classify": ["model.name=ngram", "model.buckets=512", "model.dim=16", "train.lr=0.05", "train.epochs=6"],
    "image": ["model.name=cnn", "model.width=8", "model.stages=1", "train.lr=0.01", "train.epochs=2", "distill.enabled=false"],
    "lm": ["model.name=decoder", "model.dim=32", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.ff=32",
           "train.lr=0.01", "train.epochs=2", "train.batch_size=8", "distill.enabled=false"],
}  # fmt: skip


def params_for(task: str, registry: Path, *words: str):
    return load(None, [f"task.name={task}", *FAMILIES[task], *QUICK, f"promote.registry={registry}", *words])


def train(folder: Path, params, dataset: Dataset) -> Path:
    import torch

    torch.manual_seed(params.train.seed)
    model = models.build(params.model, dataset.spec)
    fitted = fit(params, tasks.build(params, dataset), model)
    models.save(
        folder, fitted.model, params.model, dataset.spec, dataset.labels, dataset.tokenizer_path, fitted.metrics
    )
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fitted.history))
    manifest.seal(folder, "model", {}, {"seconds": 1.0})
    return folder


class Case:
    """A dataset, a model that serves as teacher, student and candidate, and an evaluation of them."""

    def __init__(self, root: Path, task: str) -> None:
        self.root, self.task = root, task
        self.dataset = tiny_dataset(root / "dataset", task, 240 if task != "lm" else 60, noise=0.05)
        self.params = params_for(task, root / "registry")
        self.model = train(root / "model", self.params, self.dataset)
        self.inputs = {"dataset": str(self.dataset.folder)} | dict.fromkeys(
            ("model", "student", "quantized"), str(self.model)
        )

    def evaluate(self, name: str, *words: str, **inputs: Path) -> dict:
        params = params_for(self.task, self.root / "registry", *words)
        given = self.inputs | {port: str(folder) for port, folder in inputs.items()}
        execute("evaluate", params, given, {"evaluation": str(self.root / name)})
        return json.loads((self.root / name / "metrics.json").read_text())

    def promote(self, name: str, quantized: Path | None = None) -> None:
        inputs = {
            "dataset": str(self.dataset.folder),
            "quantized": str(quantized or self.model),
            "evaluation": str(self.root / name),
        }
        execute("promote", self.params, inputs, {"promotion": str(self.root / "promotion")})


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request, tmp_path_factory):
    made = Case(tmp_path_factory.mktemp(request.param), request.param)
    made.metrics = made.evaluate("evaluation")
    return made


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("gate"), "classify")


def test_metrics_have_the_promised_shape(case):
    scores = ("bits_per_byte", "perplexity") if case.task == "lm" else ("accuracy", "macro_f1")
    for who in ("candidate", "teacher"):
        assert {*scores, "bytes", "latency_p50_ms", "latency_p99_ms", "throughput_per_s"} <= set(case.metrics[who])
    assert {scores[0], "name"} <= set(case.metrics["baseline"])
    assert 0 <= case.metrics["comparison"]["p_value"] <= 1
    assert case.metrics["gate"]["decision"] in ("promoted", "refused")
    assert case.metrics["gate"]["reason"]
    assert case.metrics["candidate"]["bytes"] == (case.model / "model.safetensors").stat().st_size


def test_figures_are_those_of_the_task(case):
    """Through the served path (text -> tokens -> logits) as in training's own evaluation."""
    loaded = models.load(case.model)
    found = tasks.build(case.params, case.dataset).evaluate(loaded.model, "test")
    if case.task == "lm":  # which counts the very first token too
        assert case.metrics["candidate"]["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=0.01)
    else:
        assert case.metrics["candidate"]["accuracy"] == pytest.approx(found["accuracy"])
        assert case.metrics["candidate"]["macro_f1"] == pytest.approx(found["macro_f1"])


def test_a_rerun_gives_the_same_digest(case):
    case.evaluate("again")
    first, second = (manifest.read(case.root / name) for name in ("evaluation", "again"))
    changed = [
        a.path for a, b in zip(first.files, second.files, strict=True) if a.sha256 != b.sha256 and not a.volatile
    ]
    assert changed == []
    assert first.digest == second.digest


def test_predictions_cover_every_test_row(case):
    import pyarrow.parquet as pq

    rows = pq.read_table(case.root / "evaluation" / "predictions.parquet").to_pydict()
    split = case.dataset.split("test")
    assert rows["id"] == split.column("id")
    with open(case.root / "evaluation" / "predictions.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(split)
    if case.task != "lm":
        share = np.mean([row["actual"] == row["predicted"] for row in written])
        assert share == pytest.approx(case.metrics["candidate"]["accuracy"])


def test_the_report_is_one_closed_page(case):
    page = (case.root / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 1_000_000
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)|@import|url\(|<script|<link|<iframe", page)
    assert case.metrics["gate"]["reason"][1:30] in page
    assert "prefers-color-scheme:dark" in page
    assert (
        f"{case.metrics['candidate']['bytes'] / 1e3:.0f}" in page or f"{case.metrics['candidate']['bytes']:,}" in page
    )
    balanced(page)


def balanced(page: str) -> None:
    """Every element that is opened is closed, in order."""

    void = {"meta", "img", "br", "rect", "path", "circle", "polyline", "line"}

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in void:
                assert (self.open or [""]).pop() == tag, self.getpos()

    checker = Checker()
    checker.feed(page)
    assert checker.open == []


# The gate


def test_first_model_is_promoted_if_it_beats_the_baseline_else_refused(classify):
    metrics = classify.evaluate("first")
    beats = (
        metrics["candidate"]["accuracy"] > metrics["baseline"]["accuracy"] and metrics["comparison"]["p_value"] < 0.01
    )
    assert (metrics["gate"]["decision"] == "promoted") == beats
    assert "the baseline" in metrics["gate"]["reason"]


def test_with_nothing_to_beat_a_model_is_refused_and_the_figures_keep_their_keys(classify):
    without = classify.evaluate("without", "evaluate.baseline=false")
    assert without["gate"]["decision"] == "refused"
    assert "evaluate.baseline" in without["gate"]["reason"]
    assert without["baseline"] == {"name": "none"}
    assert without["comparison"] == {}
    page = (classify.root / "without" / "report.html").read_text(encoding="utf-8")
    assert "baseline: none" not in page
    balanced(page)


def test_limits_refuse(classify):
    small = classify.evaluate("small", "evaluate.baseline=false", "promote.max_bytes=100")
    assert small["gate"]["decision"] == "refused"
    assert "promote.max_bytes" in small["gate"]["reason"]
    fast = classify.evaluate("fast", "evaluate.baseline=false", "promote.max_latency_ms=0.000001")
    assert fast["gate"]["decision"] == "refused"
    assert "promote.max_latency_ms" in fast["gate"]["reason"]


def test_challengers_are_judged_on_the_champions_own_test_set(classify, tmp_path):
    """A weak champion gives way to a better model, and the better one not to the weak one, nor to itself."""
    weak_params = params_for("classify", classify.root / "registry", "train.lr=1e-5", "train.epochs=1")
    weak = train(tmp_path / "weak", weak_params, classify.dataset)
    off = "evaluate.baseline=false"
    registry = Registry(classify.root / "registry")
    classify.evaluate("weak", off, quantized=weak)
    with pytest.raises(GateRefused, match=r"evaluate\.baseline"):
        classify.promote("weak", weak)
    registry.name_champion("m", "v0001")
    assert registry.champion("m").version == "v0001"
    strong = classify.evaluate("strong", off)
    assert strong["gate"]["decision"] == "promoted"
    assert "champion v0001" in strong["gate"]["reason"]
    assert strong["champion"]["candidate"]["accuracy"] == pytest.approx(strong["candidate"]["accuracy"])
    classify.promote("strong")
    assert registry.champion("m").version == "v0002"
    again = classify.evaluate("weak-again", off, quantized=weak)
    assert again["gate"]["decision"] == "refused"
    assert "worse" in again["gate"]["reason"]
    with pytest.raises(GateRefused):
        classify.promote("weak-again", weak)
    same = classify.evaluate("strong-again", off)
    assert same["gate"]["decision"] == "promoted"
    assert "champion already" in same["gate"]["reason"]
    classify.promote("strong-again")
    assert registry.champion("m").version == "v0002"
    assert len(registry.history("m")) == 2


def test_rows_of_the_champions_test_set_that_were_trained_on_do_not_count(classify, tmp_path):
    """A challenger from another split of the same data: what it has seen is left out, and said."""
    other = Dataset(shutil.copytree(classify.dataset.folder, tmp_path / "other"))
    for name in ("manifest.json",):
        (other.folder / name).unlink()
    (other.folder / "test").rename(other.folder / "swap")
    (other.folder / "val").rename(other.folder / "test")
    (other.folder / "swap").rename(other.folder / "val")
    manifest.seal(other.folder, "dataset", classify.dataset.meta, {})
    if not Registry(classify.root / "registry").champion("m"):
        classify.evaluate("c", "evaluate.baseline=false")
        with pytest.raises(GateRefused):
            classify.promote("c")
        Registry(classify.root / "registry").name_champion("m", "v0001")
    challenger = train(
        tmp_path / "m", params_for("classify", classify.root / "registry", "train.seed=5"), Dataset(other.folder)
    )
    metrics = classify.evaluate(
        "other",
        "evaluate.baseline=false",
        dataset=other.folder,
        model=challenger,
        student=challenger,
        quantized=challenger,
    )
    assert metrics["gate"]["decision"] == "refused"
    assert "trained on every row" in metrics["gate"]["reason"]
    assert metrics["champion"]["left_out"] == len(classify.dataset.split("test"))


def test_folds_are_trained_and_told(classify):
    metrics = classify.evaluate("folds", "evaluate.baseline=false", "evaluate.folds=2", "train.epochs=2")
    found = metrics["cross_validation"]
    assert found["folds"] == len(found["accuracies"]) == 2
    assert found["accuracy"] == pytest.approx(np.mean(found["accuracies"]))
    assert "over 2 folds" in (classify.root / "folds" / "report.html").read_text()


def test_a_model_of_other_data_is_an_error(classify, tmp_path):
    other = tiny_dataset(tmp_path / "d", "classify", 60, num_labels=3)
    with pytest.raises(ArtifactError, match="other data"):
        classify.evaluate("wrong", dataset=other.folder)
    assert not (classify.root / "wrong").exists()


def test_data_cannot_put_markup_into_the_report(classify, tmp_path):
    """Labels and texts of the user's data are shown as they are, never interpreted."""
    hostile = shutil.copytree(classify.dataset.folder, tmp_path / "hostile")
    (hostile / "manifest.json").unlink()
    attack = "<script>alert('x')</script>\"'><img src=x onerror=y>"
    (hostile / "labels.json").write_text(json.dumps([attack, "label-1", "label-2", "label-3"]))
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(hostile / "test" / "rows.parquet").to_pydict()
    rows["text"] = [f"{attack} {text}" for text in rows["text"]]
    schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("label", pa.int32()), ("source", pa.string())])
    pq.write_table(pa.table(rows, schema=schema), hostile / "test" / "rows.parquet")
    meta = classify.dataset.meta | {"source": attack, "dropped": {attack: 3}, "label_counts": {attack: 4}}
    manifest.seal(hostile, "dataset", meta, {})
    model = shutil.copytree(classify.model, tmp_path / "model")
    (model / "manifest.json").unlink()
    config = json.loads((model / "config.json").read_text())
    config["id2label"]["0"] = attack
    (model / "config.json").write_text(json.dumps(config))
    manifest.seal(model, "model", {}, {})
    classify.evaluate(
        "hostile", "evaluate.baseline=false", dataset=hostile, model=model, student=model, quantized=model
    )
    page = (classify.root / "hostile" / "report.html").read_text()
    assert "<script" not in page
    assert "onerror=y>" not in page.replace("onerror=y&gt;", "")
    assert "&lt;script&gt;" in page
    balanced(page)
