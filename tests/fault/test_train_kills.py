"""Killed training resumes to the same bits: kill -9 and SIGTERM at random moments, single process, real processes.

Children come from a fork server that has imported torch already, so that many kills cost little.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from tests.tiny import tiny_dataset
from trainer.artifacts.dataset import Dataset

pytestmark = pytest.mark.fault

WORDS = [
    "train.threads=1", "train.batch_size=4", "train.max_steps=200", "train.eval_every=50", "train.log_every=7",
    "train.checkpoint_every=10", "train.optimizer=muon", "train.lr=0.01", "train.early_stopping.patience=100",
    "model.name=encoder", "model.dim=32", "model.layers=1", "model.ff=32", "model.heads=2", "model.dropout=0.2",
]  # fmt: skip


def child(dataset: str, scratch: str | None, result: str) -> None:
    """Train, write the history's bits and the weights' digest."""
    import hashlib
    from pathlib import Path

    from trainer import models, tasks
    from trainer.config.load import load
    from trainer.errors import Preempted
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    params = load(None, WORDS)
    data = Dataset(dataset)
    seed_all(0)
    model = models.build(params.model, data.spec)
    try:
        fitted = fit(params, tasks.build(params, data), model, scratch=Path(scratch) if scratch else None)
    except Preempted as error:
        os._exit(error.exit_code)
    digest = hashlib.sha256()
    for name, value in sorted(fitted.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    rows = [{k: float(v).hex() for k, v in row.items()} for row in fitted.history]
    Path(result).write_text(json.dumps([rows, fitted.best_step, fitted.metrics, digest.hexdigest()]))


@pytest.fixture(scope="module")
def start():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trainer.train.fit", "trainer.tasks.classify", "trainer.models.encoder"])

    def start(*arguments):
        process = context.Process(target=child, args=tuple(str(a) if a else None for a in arguments))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120).folder


@pytest.fixture(scope="module")
def undisturbed(dataset, start, tmp_path_factory):
    """What a run without checkpoints and without kills gives, and how long it takes."""
    result = tmp_path_factory.mktemp("whole") / "result.json"
    began = time.monotonic()
    process = start(dataset, None, result)
    process.join(120)
    assert process.exitcode == 0
    return json.loads(result.read_text()), time.monotonic() - began


def finish(start, dataset, scratch, result):
    process = start(dataset, scratch, result)
    try:
        process.join(120)
        assert process.exitcode == 0
    finally:
        process.kill()
    return json.loads(result.read_text())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments_it_ends_with_the_same_bits(number, dataset, undisturbed, start, tmp_path):
    expected, seconds = undisturbed
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    delays = random.Random(seed)
    codes = []
    for _ in range(3):
        process = start(dataset, tmp_path / "scratch", tmp_path / "killed.json")
        try:
            time.sleep(delays.uniform(0.1, 0.6 * seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
            process.join(60)
        finally:
            process.kill()
        codes.append(process.exitcode)
    # A run may have ended before its signal, or SIGTERM may come before training listens.
    assert set(codes) <= {-number, 143, 0}
    assert finish(start, dataset, tmp_path / "scratch", tmp_path / "result.json") == expected


def wait_for(folder, pattern, process, seconds=60.0):
    """Wait until a file is there; fail if the process ends before."""
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.is_alive(), "it ended too early"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_143(dataset, undisturbed, start, tmp_path):
    process = start(dataset, tmp_path, tmp_path / "r.json")
    try:
        wait_for(tmp_path, "train/step-*", process)
        before = {path.name for path in tmp_path.glob("train/step-*")}
        time.sleep(0.05)
        process.terminate()
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 143
    after = {path.name for path in tmp_path.glob("train/step-*")}
    assert max(after) > max(before)
    assert not (tmp_path / "r.json").exists()
    assert finish(start, dataset, tmp_path, tmp_path / "r.json") == undisturbed[0]
