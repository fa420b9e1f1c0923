"""The engine around DVC: exit statuses, events, signals and orphans, on a pipeline of shell commands."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from pipelines import local, project
from pipelines.engine import Event, Repro
from pipelines.screen import Board

pytestmark = pytest.mark.pipeline


def make(folder: Path, **commands: str) -> Path:
    """A project whose stages run these commands, one after the other; each makes `NAME.txt`."""
    stages, before = "", ""
    for name, command in commands.items():
        deps = f"    deps: [{before}.txt]\n" if before else ""
        stages += f"  {name}:\n    cmd: {command}\n{deps}    outs: [{name}.txt]\n"
        before = name
    (folder / "dvc.yaml").write_text(f"stages:\n{stages}", encoding="utf-8")
    project.prepare(folder)
    return folder


def repro(folder: Path, *words: str) -> tuple[Repro, list[Event]]:
    events: list[Event] = []
    run = Repro(folder, list(words))
    run.run(events.append)
    return run, events


def kinds(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.stage) for event in events if event.kind != "line"]


def test_stages_are_told_as_they_run_and_then_as_unchanged(tmp_path: Path) -> None:
    make(tmp_path, one="echo hello; echo 1 > one.txt", two="cp one.txt two.txt")
    run, events = repro(tmp_path)
    assert run.exit_code == 0
    assert kinds(events) == [("running", "one"), ("done", "one"), ("running", "two"), ("done", "two")]
    assert Event("line", "one", "hello") in events
    run, events = repro(tmp_path)
    assert (run.exit_code, kinds(events)) == (0, [("unchanged", "one"), ("unchanged", "two")])


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (3, 3), (4, 4), (143, 143), (1, 1)])
def test_exit_status_of_the_failed_stage_comes_through(tmp_path: Path, status: int, expected: int) -> None:
    make(tmp_path, one="echo 1 > one.txt", two=f"echo oops >&2; exit {status}", three="echo 3 > three.txt")
    run, events = repro(tmp_path)
    assert run.exit_code == expected
    assert kinds(events)[-1] == ("failed", "two")
    assert Event("line", "two", "oops") in events
    assert not (tmp_path / "three.txt").exists()


def test_a_killed_stage_gives_137(tmp_path: Path) -> None:
    make(tmp_path, one="kill -9 $$")
    run, _ = repro(tmp_path)
    assert run.exit_code == 137
    assert not run.interrupted


def test_a_broken_dvc_yaml_is_an_error_with_dvcs_words(tmp_path: Path) -> None:
    make(tmp_path, one="echo 1 > one.txt")
    (tmp_path / "dvc.yaml").write_text("stages: [", encoding="utf-8")
    run, events = repro(tmp_path)
    assert run.exit_code == 1
    assert "dvc.yaml" in " ".join([*run.errors, *(event.text for event in events)])


def test_a_busy_folder_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Another DVC works here: no stage of ours failed, and no bug is spoken of."""
    make(tmp_path, one="touch started; sleep 60; echo 1 > one.txt")
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"], cwd=tmp_path, env=project.environment(), start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert local._repro(Repro(tmp_path), Board(["one"])) == 2
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()
    shown = "".join(capfd.readouterr())
    assert "another `millrace run` or dvc command works in this folder" in shown
    assert "exit code" not in shown
    assert "a bug" not in shown


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at descriptors in /proc")
def test_dvc_holds_the_projects_lock_and_a_stage_does_not(tmp_path: Path) -> None:
    make(tmp_path, one="ls -l /proc/$$/fd > one.txt; ls -l /proc/$PPID/fd > dvc")
    with project.held(tmp_path) as lock:
        assert Repro(tmp_path, keep=(lock,)).run(lambda event: None) == 0
    assert "millrace.lock" not in (tmp_path / "one.txt").read_text()
    assert "millrace.lock" in (tmp_path / "dvc").read_text()
    with project.held(tmp_path):
        pass


def test_the_last_line_without_a_line_break_is_not_lost(tmp_path: Path) -> None:
    make(tmp_path, one="echo 1 > one.txt; printf no-newline; exit 2")
    run, events = repro(tmp_path)
    text = "".join(event.text for event in events)
    assert "no-newline" in text
    assert run.exit_code != 0


DRIVER = """
import sys
from pathlib import Path
from pipelines.engine import Repro
run = Repro(Path.cwd())
print("ready", flush=True)
code = run.run(lambda event: print(event.kind, event.stage, event.text, flush=True))
sys.exit(code)
"""


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_line(process: subprocess.Popen, wanted: str, deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    assert process.stdout is not None
    while time.monotonic() < end:
        line = process.stdout.readline()
        if wanted in line:
            return
        assert line, f"ended before it said {wanted!r}"
    raise AssertionError(f"never said {wanted!r}")


def stop(process: subprocess.Popen, *groups: int) -> None:
    for group in (process.pid, *groups):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


SAVES = """
import signal, sys, time, pathlib
def save(*_):
    time.sleep(0.5)
    pathlib.Path("saved.txt").write_text("state")
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, lambda *_: sys.exit(99))
print("working", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_reaches_the_stage_which_saves_its_state(tmp_path: Path, number: int, status: int) -> None:
    (tmp_path / "saves.py").write_text(textwrap.dedent(SAVES), encoding="utf-8")
    make(tmp_path, one="python saves.py")
    process = start(tmp_path)
    try:
        wait_for_line(process, "working")
        process.send_signal(number)
        assert process.wait(timeout=30) == status
        assert (tmp_path / "saved.txt").read_text(encoding="utf-8") == "state"
        assert leftovers(tmp_path) == []
    finally:
        stop(process)


def test_a_signal_before_there_is_a_process_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, one="sleep 60")
    real = subprocess.Popen

    def late(*words: object, **options: object) -> subprocess.Popen:
        monkeypatch.setattr(subprocess, "Popen", real)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", late)
    run, events = repro(tmp_path)
    assert run.exit_code == 143
    assert ("done", "one") not in kinds(events)


def leftovers(folder: Path) -> list[str]:
    """Processes that still work in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                Path(process.cwd()) == folder
                and process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_dvc_dying_leaves_no_stage_behind(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text("import time\nprint('working', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    make(tmp_path, one="python sleeps.py")
    process = start(tmp_path)
    try:
        wait_for_line(process, "working")
        (dvc,) = psutil.Process(process.pid).children()
        dvc.kill()
        assert process.wait(timeout=30) != 0
        assert leftovers(tmp_path) == []
    finally:
        stop(process)


def test_after_a_stop_the_next_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(
        "import pathlib, time\nprint('working', flush=True)\n"
        "if not pathlib.Path('second').exists():\n    time.sleep(60)\npathlib.Path('two.txt').write_text('2')\n",
        encoding="utf-8",
    )
    make(tmp_path, one="echo 1 > one.txt", two="python once.py")
    process = start(tmp_path)
    try:
        wait_for_line(process, "working")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        stop(process)
    (tmp_path / "second").touch()
    run, events = repro(tmp_path)
    assert run.exit_code == 0
    assert kinds(events) == [("unchanged", "one"), ("running", "two"), ("done", "two")]
