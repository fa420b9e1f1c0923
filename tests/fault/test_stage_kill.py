"""Stages that are killed or interrupted: what is left, what the next run does, and the exit status."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toy import make
from trainer import scratch, storage
from trainer.artifacts import manifest
from trainer.errors import StorageError

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[2]


def start(todo, source, out, *words, **options):
    command = [sys.executable, "-m", "tests.toy", "toy", "--in", f"source={source}", "--out", f"made={out}/made"]
    return subprocess.Popen(
        [*command, "--out", f"notes={out}/notes", *words],
        env={**os.environ, "TOY": todo}, cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def end(process, sign=signal.SIGKILL):
    """(status, stdout, stderr) after the signal."""
    try:
        if process.poll() is None:
            os.kill(process.pid, sign)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended before {text!r}: {process.communicate(timeout=30)}")


def test_scratch_outlives_a_kill_and_is_removed_by_success(tmp_path):
    source = make(tmp_path / "source")
    out = tmp_path / "out"
    for attempt in (1, 2):
        process = start("wait", source, out)
        try:
            wait_for(process, "waiting")
        finally:
            assert end(process)[0] == -signal.SIGKILL
        assert not (out / "made").exists()
        (scratch,) = (out / ".scratch").iterdir()
        assert (scratch / "attempts").read_text() == "x" * attempt
    done = start("write", source, out)
    assert done.wait(timeout=60) == 0, end(done)
    end(done)
    assert (out / "notes" / "attempts.txt").read_text() == "xxx"
    assert sorted(path.name for path in out.iterdir()) == ["made", "notes"]


def test_scratch_is_another_one_for_other_parameters_and_inputs(tmp_path):
    source, other = make(tmp_path / "source"), make(tmp_path / "other", files={"a": b"1"})
    out = tmp_path / "out"
    for given, words in ((source, []), (source, ["train.lr=0.5"]), (other, [])):
        process = start("wait", given, out, *words)
        try:
            wait_for(process, "waiting")
        finally:
            end(process)
    assert [(scratch / "attempts").read_text() for scratch in (out / ".scratch").iterdir()] == ["x", "x", "x"]


def test_success_sweeps_what_killed_runs_left_long_ago_but_nothing_in_use(tmp_path):
    source, out = make(tmp_path / "source"), tmp_path / "out"
    place, long_ago = out / ".scratch", time.time() - scratch.STALE_S - 60
    for rate in ("0.5", "0.75"):
        killed = start("wait", source, out, f"train.lr={rate}")
        try:
            wait_for(killed, "waiting")
        finally:
            end(killed)
    old, young = sorted(place.iterdir())
    (place / "toyland").mkdir()
    (place / f"toy-{'0' * 12}").write_text("a file")
    at_work = start("wait", source, out, "train.lr=0.25")
    try:
        wait_for(at_work, "waiting")
        (used,) = {path for path in place.glob("toy-*") if path.is_dir()} - {old, young}
        for path in (old, used, place / "toyland", place / f"toy-{'0' * 12}"):
            os.utime(path, (long_ago, long_ago))
        done = start("write", source, out)
        assert done.wait(timeout=60) == 0, end(done)
        end(done)
        assert set(place.iterdir()) == {used, young, place / "toyland", place / f"toy-{'0' * 12}"}
        assert (used / "attempts").read_text() == "x"
    finally:
        end(at_work)


def test_success_sweeps_nothing_in_a_scratch_folder_that_was_named(tmp_path):
    source, out, place = make(tmp_path / "source"), tmp_path / "out", tmp_path / "scratch"
    killed = start("wait", source, out, "train.lr=0.5", "--scratch", str(place))
    try:
        wait_for(killed, "waiting")
    finally:
        end(killed)
    (left,) = place.iterdir()
    os.utime(left, (0, 0))
    done = start("write", source, out, "--scratch", str(place))
    assert done.wait(timeout=60) == 0, end(done)
    end(done)
    assert list(place.iterdir()) == [left]
    storage.remove(left)
    done = start("write", source, out, "--scratch", str(place))
    assert done.wait(timeout=60) == 0, end(done)
    end(done)
    assert list(place.iterdir()) == []


def test_the_same_run_twice_at_once_is_refused_and_leaves_the_first_alone(tmp_path):
    source, out = make(tmp_path / "source"), tmp_path / "out"
    first = start("wait", source, out)
    try:
        wait_for(first, "waiting")
        second = start("write", source, out)
        try:
            status = second.wait(timeout=60)
        finally:
            _, _, stderr = end(second)
        assert status == StorageError.exit_code
        assert "another process runs this stage" in stderr
        assert "--scratch" in stderr
        (scratch,) = (out / ".scratch").iterdir()
        assert (scratch / "attempts").read_text() == "x"
        assert not (out / "made").exists()
        elsewhere = start("write", source, out, "--scratch", str(tmp_path / "scratch"))
        assert elsewhere.wait(timeout=60) == 0, end(elsewhere)
        end(elsewhere)
    finally:
        end(first)


def test_runs_that_start_as_another_ends_never_share_a_scratch_folder(tmp_path):
    """Four identical runs at once: each ends well or is refused, one after the other."""
    source, out = make(tmp_path / "source"), tmp_path / "out"
    processes = [start("write", source, out) for _ in range(4)]
    try:
        statuses = [process.wait(timeout=90) for process in processes]
    finally:
        errors = [end(process)[2] for process in processes]
    assert set(statuses) <= {0, StorageError.exit_code}, errors
    assert 0 in statuses
    assert (out / "notes" / "attempts.txt").read_text() == "x"
    assert not (out / ".scratch").exists()


def test_parameters_of_other_sections_do_not_change_the_scratch(tmp_path):
    source = make(tmp_path / "source")
    for words in ([], ["evaluate.seed=7"]):
        process = start("wait", source, tmp_path / "out", *words)
        try:
            wait_for(process, "waiting")
        finally:
            end(process)
    (scratch,) = (tmp_path / "out" / ".scratch").iterdir()
    assert (scratch / "attempts").read_text() == "xx"


def test_fourteen_kills_at_random_moments_leave_nothing_that_is_accepted_by_mistake(tmp_path):
    source = make(tmp_path / "source")
    reference = start("write", source, tmp_path / "reference")
    assert reference.wait(timeout=60) == 0
    end(reference)
    digest = manifest.read(tmp_path / "reference" / "made", "model").digest
    generator = random.Random(5)
    whole = 0
    for number in range(14):
        out = tmp_path / "out" / str(number % 4)
        process = start("write", source, out)
        try:
            # Half of them while the outputs are written, which is soon after the stage says that it is at work.
            if number % 2:
                wait_for(process, "toy at work")
                time.sleep(generator.uniform(0.0, 0.02))
            else:
                time.sleep(generator.uniform(0.0, 0.8))
        finally:
            end(process)
        if (out / "made").exists():
            assert manifest.read(out / "made", "model").digest == digest
            whole += 1
    for number in range(4):
        out = tmp_path / "out" / str(number)
        process = start("write", source, out)
        assert process.wait(timeout=60) == 0
        end(process)
        assert manifest.read(out / "made", "model").digest == digest
        assert {path.name for path in out.iterdir()} == {"made", "notes"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_interrupt_exits_with_130_and_no_traceback(tmp_path, log_format):
    process = start("wait", make(tmp_path / "source"), tmp_path / "out", "--log-format", log_format)
    try:
        wait_for(process, "waiting")
    finally:
        status, _, stderr = end(process, signal.SIGINT)
    assert status == 130
    assert "Traceback" not in stderr
    assert not (tmp_path / "out" / "made").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".scratch"]


def test_a_reader_that_has_gone_ends_the_stage_quietly(tmp_path):
    process = start("chatty", make(tmp_path / "source"), tmp_path / "out")
    wait_for(process, "toy at work")
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 141
    assert stderr == ""
    assert not (tmp_path / "out" / "made").exists()


def test_help_into_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "--help"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(write)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode in (0, 141)  # argparse itself ignores that help cannot be written
