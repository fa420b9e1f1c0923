"""Model cards: what Hugging Face reads from them, and that text from data cannot change their structure."""

import json
import re

import pytest
import yaml

from tests.tiny import tiny_dataset
from trainer.artifacts import manifest
from trainer.artifacts.card import write_model_card
from trainer.artifacts.dataset import Dataset


def card(folder, dataset, **changes):
    given = {"title": "a model", "metrics": {"val_accuracy": 0.9}, "params": {"train": {"lr": 0.1}}, "made_by": "train"}
    write_model_card(folder, dataset=dataset, **(given | changes))
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("task", ["classify", "lm", "image"])
def test_front_matter_is_a_model_index(tmp_path, task):
    dataset = tiny_dataset(tmp_path / "d", task, 40)
    front, body = card(tmp_path, dataset, metrics={"val_macro_f1": 0.5, "test_accuracy": 0.7, "loss": 1.25})
    results = front["model-index"][0]["results"]
    assert {result["dataset"]["split"] for result in results} == {"validation", "test"}
    assert results[0]["metrics"] == [{"type": "macro_f1", "value": 0.5}]
    assert {"type": "loss", "value": 1.25} in results[1]["metrics"]
    assert all(result["dataset"]["revision"] == dataset.meta["data_version"] for result in results)
    assert dataset.meta["data_version"] in body
    assert dataset.manifest.digest in body
    for heading in ("Intended use", "Training data", "Evaluation", "Parameters", "Limitations"):
        assert f"\n## {heading}\n" in body


def test_huggingface_reads_it(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    card(tmp_path, tiny_dataset(tmp_path / "d", "classify", 40))
    read = hub.ModelCard.load(tmp_path / "README.md")
    assert read.data.eval_results[0].metric_value == 0.9


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    dataset = tiny_dataset(tmp_path / "d", "classify", 40)
    card(tmp_path, dataset)
    first = (tmp_path / "README.md").read_bytes()
    card(tmp_path, dataset)
    assert (tmp_path / "README.md").read_bytes() == first


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    front, body = card(tmp_path, tiny_dataset(tmp_path / "d", "classify", 40), metrics={"val_loss": float("nan")})
    assert front["model-index"][0]["results"] == []
    assert "Not evaluated yet" in body


def test_text_from_data_stays_text(tmp_path):
    dataset = tiny_dataset(tmp_path / "d", "classify", 40)
    attack = "a|b`c\n---\n# heading\n<script>"
    (dataset.folder / "labels.json").write_text(json.dumps([attack, "x", "y", "z"]))
    (dataset.folder / "manifest.json").unlink()
    meta = dataset.meta | {"source": attack, "dropped": {attack: 1}}
    manifest.seal(dataset.folder, "dataset", meta, {})
    front, body = card(tmp_path, Dataset(dataset.folder), title=attack, params={"k": "```\n# x", "t": (1, 2)})
    assert front["model-index"][0]["name"] == attack
    assert "\n# heading" not in body
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", body.split("## Parameters")[0])
    assert "````yaml" in body
    assert body.count("\n## ") == 5
