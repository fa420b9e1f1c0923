"""What stands in the record and the card of a trained model: the parameters of the search, where there was one."""

from __future__ import annotations

import json

import pytest

from tests.tiny import tiny_dataset
from trainer.__main__ import main
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.stage import execute
from trainer.train import inject


def test_the_record_and_the_card_hold_the_tuned_parameters(tmp_path):
    data = tiny_dataset(tmp_path / "d", "classify", rows=60)
    tuning = tmp_path / "tuning"
    tuning.mkdir()
    (tuning / "best.json").write_text(json.dumps({"params": {"train.lr": 0.0123, "model.dim": 24}}))
    manifest.seal(tuning, "tuning", {}, {})
    words = ["model.name=ngram", "model.buckets=64", "model.dim=16", "train.max_steps=2", "train.threads=1"]
    inputs = {"dataset": str(data.folder), "tuning": str(tuning)}
    execute(
        "train",
        load(None, [*words, "train.lr=0.4321", "parallel.timeout_s=77.0"]),
        inputs,
        {"model": str(tmp_path / "m")},
    )
    params = manifest.read(tmp_path / "m").record["params"]
    assert (params["train"]["lr"], params["model"]["dim"], params["parallel"]["timeout_s"]) == (0.0123, 24, 77.0)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "0.0123" in card
    assert "0.4321\n" not in card


@pytest.mark.parametrize(
    ("policy", "counted"),
    [("stop", None), ("skip", {"skipped": 2, "rollbacks": 0}), ("rollback", {"skipped": 0, "rollbacks": 2})],
)
def test_inputs_that_are_not_finite_end_the_stage_or_are_counted(tmp_path, monkeypatch, capsys, policy, counted):
    data = tiny_dataset(tmp_path / "d", "image", rows=60)
    monkeypatch.setenv(inject.VARIABLE, "nan-input@3,nan-input@5")
    words = ["task.name=image", "model.name=cnn", "model.width=4", "train.max_steps=6", "train.threads=1",
             "train.batch_size=4", "distill.enabled=false", f"train.nonfinite.policy={policy}"]  # fmt: skip
    status = main(["train", "--in", f"dataset={data.folder}", "--out", f"model={tmp_path / 'm'}", *words])
    said = capsys.readouterr()
    if counted is None:
        assert status == 3
        assert "step 3 of 6: inputs are not finite in rows" in said.err
        assert "of the train split; the weights were not changed" in said.err
        assert not (tmp_path / "m").exists()
        return
    assert status == 0
    meta = manifest.read(tmp_path / "m").meta
    assert {name: meta[name] for name in counted} == counted
    assert "step 5 of 6: inputs are not finite in rows" in said.out
