"""A finished run on a small real subset, made once for all tests and workers; each test gets a copy of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Small enough for seconds. Without a baseline, which wins on so few rows; the first champion is named by hand.
SMALL = [
    "data.max_rows=600", "data.min_label_rows=12", "data.tokenizer.vocab_size=1000", "data.max_length=128",
    "train.epochs=4", "train.lr=3e-2", "train.batch_size=32", "train.threads=1", "model.buckets=8192", "model.dim=32",
    "distill.student.buckets=4096", "distill.student.dim=24", "tune.trials=2", "tune.epochs=1", "evaluate.bootstrap=100",
    "evaluate.latency_runs=10", "evaluate.baseline=false", "quantize.torchao=false",
]  # fmt: skip
GIT = ("-c", "user.name=a tester", "-c", "user.email=tester@localhost", "-c", "commit.gpgsign=false")

Run = Callable[..., subprocess.CompletedProcess]


def environment() -> dict[str, str]:
    """This Python's commands first on the path, as in an activated environment; the user's git settings left out."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env["PYTHONPATH"] = str(ROOT)
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "OMP_NUM_THREADS": "1"}
    return env


def run_in(folder: Path, *words: str, code: int | None = 0, deadline_s: float = 280) -> subprocess.CompletedProcess:
    """Run a command in a folder and check its exit code; `millrace` is this checkout's."""
    if words[0] == "millrace":
        words = (sys.executable, "-m", "pipelines.cli", *words[1:])
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=deadline_s, check=False
    )
    assert code is None or done.returncode == code, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def make_project(folder: Path) -> None:
    """The default preset, small, run to the end in a git repository."""
    folder.mkdir()
    run_in(folder, "git", "init", "-q", "-b", "main")
    run_in(folder, "millrace", "preset", "use", "text-classify")
    shutil.copyfile(ROOT / ".gitignore", folder / ".gitignore")
    run_in(folder, "millrace", "run", *SMALL, code=4)
    run_in(folder, "millrace", "registry", "promote", "v0001")
    run_in(folder, "millrace", "run")
    run_in(folder, "git", "add", "-A")
    run_in(folder, "git", *GIT, "commit", "-qm", "first run")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project that all workers share; do not write to it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / "finished"
        if not (shared / "finished.done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_project(folder)
            (shared / "finished.done").touch()
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, to run and to break."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder, symlinks=True)
    return folder
