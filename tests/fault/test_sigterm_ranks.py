"""SIGTERM to a job of two ranks while they start, and while real compilers run: it ends with 143 and nothing half-written."""

from __future__ import annotations

import contextlib
import time

import psutil
import pytest

from tests.parallel.test_train_ranks import DEADLINE, TWO, Run
from tests.tiny import tiny_dataset

pytestmark = [pytest.mark.fault, pytest.mark.slow]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120).folder


def wait(run: Run, condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert run.process.poll() is None, run.finish()[1]
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.01)


def compiling(run: Run) -> bool:
    """Whether a C++ compiler is at work for a rank."""
    for process in run.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() in ("cc1plus", "clang++", "clang"):
                return True
    return False


def test_told_while_they_start_ranks_leave_nothing_and_the_job_begins_again(dataset, tmp_path):
    words = [*TWO, "train.max_steps=4"]
    with Run(dataset, tmp_path, *words) as run:
        wait(run, lambda: len(run.ranks()) == 2)
        run.process.terminate()
        code, output = run.finish()
        assert code == 143, output
        assert run.gone()
        assert not run.newest()
        assert not run.out.exists()
    with Run(dataset, tmp_path, *words) as run:
        code, output = run.finish()
        assert code == 0, output


@pytest.mark.parametrize("words", [[], ["parallel.zero=3"]], ids=["whole", "divided"])
def test_told_while_compilers_run_ranks_leave_before_these_are_done(dataset, tmp_path, monkeypatch, words):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cold"))
    with Run(dataset, tmp_path, *TWO, *words, "train.compile=true") as run:
        wait(run, lambda: compiling(run))
        run.process.terminate()
        code, output = run.finish()
        assert code == 143, output
        assert (
            "SIGTERM before the first step" if words else "SIGTERM at step 0 of 150; a checkpoint was written"
        ) in output
        assert run.gone()
        assert run.newest() == ("" if words else "step-000000000")
        assert not run.out.exists()
