"""Retries at the entry point: what is repeated, how often, and that signals end it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.supervise import without

ROOT = Path(__file__).parents[2]
# A stage that notes each attempt and ends as it is told.
STAGE = """
import os, signal, sys, time
from trainer import supervise
with open(os.environ["NOTES"], "a") as notes:
    notes.write(f"{os.getpid()} ")
mode = os.environ["MODE"]
if mode.startswith("exit"):
    sys.exit(int(mode[4:]))
if mode.startswith("signal"):
    os.kill(os.getpid(), int(mode[6:]))
if mode == "once" and len(open(os.environ["NOTES"]).read().split()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "wait":
    time.sleep(60)
"""


def start(tmp_path: Path, mode: str, retries: int = 2, backoff: float = 0.0) -> subprocess.Popen:
    """The supervisor as a process, with a package `trainer` before ours whose main is the stage above."""
    package = tmp_path / "trainer"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'trainer')!r})\n__version__ = '0'\n")
    (package / "__main__.py").write_text(STAGE)
    code = f"import sys\nfrom trainer.supervise import supervise\nsys.exit(supervise(['toy'], {retries}, {backoff}))"
    env = dict(os.environ, PYTHONPATH=str(tmp_path), NOTES=str(tmp_path / "notes"), MODE=mode)
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, cwd=tmp_path)


def end(process: subprocess.Popen) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out


def attempts(tmp_path: Path) -> int:
    return len((tmp_path / "notes").read_text().split())


@pytest.mark.parametrize(
    ("mode", "status", "count"),
    [("exit0", 0, 1), ("exit1", 1, 1), ("exit2", 2, 1), ("exit3", 3, 1), ("exit4", 4, 1), ("exit137", 137, 3),
     ("signal9", 137, 3), ("signal11", 139, 3), ("exit130", 130, 1), ("exit143", 143, 1), ("once", 0, 2)],
)  # fmt: skip
def test_what_a_signal_killed_is_repeated_and_nothing_else(mode, status, count, tmp_path):
    assert end(start(tmp_path, mode))[0] == status
    assert attempts(tmp_path) == count


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_it_is_repeated_as_often_as_configured(retries, tmp_path):
    status, out = end(start(tmp_path, "signal9", retries))
    assert status == 137
    assert attempts(tmp_path) == retries + 1
    assert out.count("attempt") == retries


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().strip():
            return int(path.read_text().split()[-1])
        time.sleep(0.02)
    raise AssertionError("the stage did not start")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_reaches_the_stage_and_ends_the_attempts(tmp_path):
    process = start(tmp_path, "wait", retries=5)
    try:
        pid = wait_for(tmp_path / "notes")
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 143
    finally:
        process.kill()
    assert attempts(tmp_path) == 1
    assert not alive(pid)


def test_sigterm_while_waiting_ends_the_wait(tmp_path):
    process = start(tmp_path, "signal9", retries=5, backoff=3600)
    try:
        wait_for(tmp_path / "notes")
        process.stdout.readline()  # it says that it waits
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 137
    finally:
        process.kill()
    assert attempts(tmp_path) == 1


def test_the_child_is_not_told_to_retry():
    words = ["train", "--retries", "2", "--executor-input", "{}", "--backoff=3", "train.lr=1"]
    assert without(words, ("--retries", "--backoff")) == ["train", "--executor-input", "{}", "train.lr=1"]


def test_the_entry_point_takes_retries():
    command = [sys.executable, "-m", "trainer", "train", "--retries", "1", "--params", "none.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("none.yaml") == 1, "a wrong file is not tried twice"


def test_an_option_that_is_cut_short_is_no_option():
    # The child would be given it as well, supervise a child of its own, and so on without end.
    command = [sys.executable, "-m", "trainer", "train", "--retr", "1", "--params", "none.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.terminate()  # is passed on, down to the last of them
    assert process.returncode == 2
    assert "--retr" in err
