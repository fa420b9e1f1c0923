"""Two local ranks under torchrun: equal to one, exact after kills, nothing left behind, exit codes kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import tiny_dataset

pytestmark = pytest.mark.parallel

DEADLINE = 240.0
# A dead rank has ended its job after so many seconds.
DEAD_S = 30.0
WORDS = [
    "train.threads=1", "train.max_steps=150", "train.eval_every=50", "train.log_every=1", "train.lr=0.01",
    "train.checkpoint_every=5", "model.name=encoder", "model.dim=32", "model.layers=1", "model.ff=32", "model.heads=2",
]  # fmt: skip
TWO = ["train.processes=2", "train.batch_size=4", "parallel.timeout_s=60"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120).folder


class Run:
    """A stage in a process of its own, with everything that it starts ended at the end."""

    def __init__(self, dataset: Path, place: Path, *words: str) -> None:
        self.out = place / "model"
        self.scratch = place / "scratch"
        command = [sys.executable, "-m", "trainer", "train", "--in", f"dataset={dataset}", "--out", f"model={self.out}"]
        command += ["--scratch", str(self.scratch), *WORDS, *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        for process in [*self.children(), *self.seen]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.communicate()

    def children(self) -> set[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.seen

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "trainer.train.worker" in process.cmdline() and "trainer.parallel.agent" not in process.cmdline():
                    found.append(process)
        return sorted(found, key=lambda process: process.environ().get("RANK", ""))

    def newest(self) -> str:
        return max((path.name for path in self.scratch.glob("*/train/step-*")), default="")

    def wait_for_checkpoint(self, after: str = "") -> str:
        """The newest checkpoint's name, once there is one newer than `after`."""
        end = time.monotonic() + DEADLINE
        while True:
            ended = self.process.poll() is not None
            newest = self.newest()
            if newest > after:
                return newest
            assert not ended, "it ended without a newer checkpoint"
            assert time.monotonic() < end, "no checkpoint in time"
            time.sleep(0.01)

    def finish(self, within: float = DEADLINE) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=within)
        return self.process.returncode, output

    def gone(self) -> bool:
        """Whether all that it started ends within ten seconds."""
        _, alive = psutil.wait_procs(self.children(), timeout=10)
        return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def history(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.out / "history.jsonl").read_text().splitlines()]


def bits(rows: list[dict[str, float]]) -> list[dict[str, str]]:
    return [{name: float(value).hex() for name, value in row.items()} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    with Run(dataset, tmp_path_factory.mktemp("two"), *TWO) as run:
        code, output = run.finish()
        assert code == 0, output
        assert run.gone()
        return history(run), (run.out / "model.safetensors").read_bytes()


def test_two_ranks_end_with_the_same_bits_whatever_kills_them(dataset, undisturbed, tmp_path):
    words = [*TWO, "parallel.max_restarts=1"]
    # The parent is killed: its ranks end with it.
    with Run(dataset, tmp_path, *words) as run:
        first = run.wait_for_checkpoint()
        assert len(run.ranks()) == 2
        run.process.kill()
        assert run.gone()
    assert not run.out.exists()
    # SIGTERM: a checkpoint of the last step, and 143 although torchrun says 1.
    with Run(dataset, tmp_path, *words) as run:
        second = run.wait_for_checkpoint(first)
        run.process.terminate()
        code, output = run.finish()
        assert code == 143, output
        assert "a checkpoint was written" in output
        assert run.gone()
        third = run.newest()
        assert third >= second
    assert not run.out.exists()
    # One rank is killed: torchrun starts both again, and they go on from the newest checkpoint.
    with Run(dataset, tmp_path, *words) as run:
        run.wait_for_checkpoint(third)
        os.kill(run.ranks()[1].pid, signal.SIGKILL)
        code, output = run.finish()
        assert code == 0, output
        assert run.gone()
        assert (bits(history(run)), (run.out / "model.safetensors").read_bytes()) == (
            bits(undisturbed[0]), undisturbed[1],
        )  # fmt: skip


def test_two_ranks_equal_one(dataset, tmp_path):
    common = ["train.max_steps=8", "model.dropout=0.0", "train.optimizer=sgd", "train.eval_every=4"]
    with (
        Run(dataset, tmp_path / "2", *TWO, *common) as two,
        Run(dataset, tmp_path / "1", "train.batch_size=8", *common) as one,
    ):
        for run in (one, two):
            code, output = run.finish()
            assert code == 0, output
        rows = list(zip(history(one), history(two), strict=True))
    assert len(rows) == 10
    for ours, theirs in rows:
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-6)  # in float32, a norm of 10 has steps of 1e-6


def test_a_dead_rank_ends_the_job_and_says_which(dataset, tmp_path):
    with Run(dataset, tmp_path, *TWO, "train.max_steps=5000") as run:
        run.wait_for_checkpoint()
        os.kill(run.ranks()[1].pid, signal.SIGKILL)
        code, output = run.finish(DEAD_S)
        assert (code, "rank 1 was ended by SIGKILL" in output) == (137, True), output
        assert "Traceback" not in output
        assert run.gone()


def test_a_ranks_error_comes_out_as_if_in_process(dataset, tmp_path):
    with Run(dataset, tmp_path, *TWO, "train.device=cuda", "parallel.max_restarts=3") as run:
        code, output = run.finish()
    assert code == 2, output
    assert output.strip().splitlines()[-2:] == [
        "error: train.device: cuda, but torch sees no GPU", "  fix: use train.device=auto",
    ]  # fmt: skip
