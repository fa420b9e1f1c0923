"""Kills of the stage tune: whatever the moment, the next call ends with what an undisturbed one finds."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny import tiny_dataset
from trainer.artifacts import manifest

pytestmark = pytest.mark.fault
DEADLINE = 120.0
OVERRIDES = [
    "model.name=ngram", "model.buckets=128", "model.dim=8", "train.epochs=3", "train.batch_size=16", "train.threads=1",
    "tune.trials=5", "tune.sampler=tpe", "tune.pruner=hyperband",
]  # fmt: skip


def start(root, tmp_path, out, log) -> subprocess.Popen:
    command = [sys.executable, "-m", "trainer", "tune", "--in", f"dataset={tmp_path / 'dataset'}"]
    command += ["--out", f"tuning={tmp_path / out / 'tuning'}", *OVERRIDES]
    return subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(DEADLINE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def test_a_search_that_was_terminated_and_killed_ends_with_the_same_best(root, tmp_path):
    tiny_dataset(tmp_path / "dataset", "classify", 200)
    with open(tmp_path / "log", "w+") as log:
        assert finish(start(root, tmp_path, "whole", log)) == 0, (tmp_path / "log").read_text()
        rng = random.Random(7)
        signals = [signal.SIGTERM, signal.SIGKILL]
        code = -1
        while code != 0:
            process = start(root, tmp_path, "killed", log)
            try:
                # Wait for the search to be under way, then for a random moment of it.
                end = time.monotonic() + DEADLINE
                before = log.seek(0, os.SEEK_END)
                while signals and process.poll() is None and time.monotonic() < end:
                    if log.seek(0, os.SEEK_END) > before:
                        time.sleep(rng.uniform(0, 0.2))
                        process.send_signal(signals.pop(0))
                        break
                    time.sleep(0.02)
            finally:
                code = finish(process)
            assert code in (0, -signal.SIGKILL, -signal.SIGTERM, 143), (tmp_path / "log").read_text()
            assert (tmp_path / "killed" / "tuning").exists() == (code == 0)
    assert not signals
    whole, killed = (manifest.read(tmp_path / out / "tuning").digest for out in ("whole", "killed"))
    assert killed == whole
    assert json.loads((tmp_path / "killed" / "tuning" / "best.json").read_text())["params"]
    assert [path.name for path in (tmp_path / "killed").iterdir() if ".tmp" in path.name] == []
