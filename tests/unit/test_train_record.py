"""What stands in the record and the card of a trained model: the parameters of the search, where there was one."""

from __future__ import annotations

import json

from tests.tiny import tiny_dataset
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.stage import execute


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
