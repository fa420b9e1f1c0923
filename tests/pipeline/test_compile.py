"""Slow: training with torch.compile, which takes its time to compile."""

import json
import os
import subprocess
import sys

import pytest

from tests.tiny import tiny_dataset
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.train.device import machine

WORDS = [
    "model.name=textcnn", "model.dim=16", "model.filters=8", "model.dropout=0", "train.max_steps=12", "train.batch_size=16",
    "train.threads=1", "train.log_every=1", "distill.enabled=false",
]  # fmt: skip


def losses(root, tmp_path, compiled: bool) -> list[float]:
    out = tmp_path / f"model-{compiled}"
    command = [sys.executable, "-m", "trainer", "train", "--in", f"dataset={tmp_path / 'dataset'}"]
    command += ["--out", f"model={out}", *WORDS, f"train.compile={compiled}"]
    done = subprocess.run(command, cwd=root, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recompile_limit" not in done.stderr
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


@pytest.mark.pipeline
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_compiled_run_has_the_losses_of_a_plain_one(root, tmp_path):
    tiny_dataset(tmp_path / "dataset", "classify", 200)
    plain, compiled = (losses(root, tmp_path, each) for each in (False, True))
    assert len(plain) > 1
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_without_a_compiler_the_setting_is_named(monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"train\.compile"), machine(load(None, ["train.compile=true"]).train):
        pass
