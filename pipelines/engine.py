"""DVC as a child process: its output as events, signals forwarded to the stage that runs, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from pipelines.project import environment
from trainer import signals
from trainer.errors import EXIT_BAD_INPUT

if TYPE_CHECKING:
    import psutil

# How long a stage may take to save its state after a signal, and how long what it left behind may take to end.
GRACE_S = 60.0
REST_S = 5.0
_SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "ash")
_EVENTS = {
    "running": re.compile(r"^Running stage '([^']+)':$"),
    "unchanged": re.compile(r"^Stage '([^']+)' didn't change, skipping$"),
    "restored": re.compile(r"^Stage '([^']+)' is cached - skipping run, checking out outputs"),
    "failed": re.compile(r"^ERROR: failed to reproduce '([^']+)'"),
}
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock")
_EXITED = re.compile(r"exited with (-?\d+)\s*$")
_NOISE = re.compile(
    r"^(> python -m |'[^']+\.dvc' didn't change, skipping|Verifying data sources in stage: |"
    r"Generating lock file|Updating lock file|Data and pipelines are up to date|"
    r"Use `dvc push`|To track the changes|\s*git add |To enable auto staging|\s*dvc config core\.autostage|$)"
)


@dataclass(frozen=True)
class Event:
    """Something that DVC did: `kind` is running, unchanged, restored, failed, done, line or tick (time passed)."""

    kind: str
    stage: str = ""
    text: str = ""


@dataclass
class Repro:
    """A `dvc repro` in a project's folder.

    Attributes:
        folder: the project's folder.
        words: arguments of `dvc repro`.
        exit_code: after the run: 0, the failed stage's own exit status, or 128 + signal.
        errors: DVC's own error lines.
        keep: descriptors that DVC holds open as long as it lives, and no stage does.
    """

    folder: Path
    words: list[str] = field(default_factory=list)
    exit_code: int = 0
    errors: list[str] = field(default_factory=list)
    keep: tuple[int, ...] = ()
    _signal: int = 0
    _signalled: float = 0.0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal to this process ended the run."""
        return bool(self._signal)

    @property
    def busy(self) -> bool:
        """Whether another DVC process was at work in the folder."""
        return any(_BUSY.search(line) for line in self.errors)

    def run(self, on_event: Callable[[Event], None], tick_s: float = 0.0) -> int:
        """Run it and hand each event to `on_event`; with `tick_s`, a tick at least so often. Returns `exit_code`."""
        command = [sys.executable, "-m", "dvc", "repro", *self.words]
        with signals.caught(self._on_signal, *signals.END):
            # A session of its own: the terminal's Ctrl-C reaches only us, and we pass it on in an order that lets
            # the stage save its state before DVC gives up.
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self.keep,
            )
            assert self._process.stdout is not None
            if self._signal:
                self._forward()  # it came before there was a process to pass it on to
            try:
                self._read(self._process.stdout, on_event, tick_s)
            finally:
                self._end()
                self._process.stdout.close()
        status = self._process.returncode
        if self._signal:
            self.exit_code = 128 + self._signal
        elif self.busy:
            self.exit_code = EXIT_BAD_INPUT
        elif status and not self.exit_code:
            self.exit_code = 1
        return self.exit_code

    def _read(self, pipe: IO[bytes], on_event: Callable[[Event], None], tick_s: float) -> None:
        current = ""
        for line in self._lines(pipe, tick_s):
            event = self._event(line, current) if line is not None else Event("tick", current)
            if event is None:
                continue
            if event.kind in ("running", "unchanged", "restored"):
                if current:
                    on_event(Event("done", current))
                current = event.stage if event.kind == "running" else ""
            elif event.kind == "failed":
                current = ""
            on_event(event)
        if current and not self._signal and self._wait() == 0:
            on_event(Event("done", current))

    def _event(self, line: str, current: str) -> Event | None:
        for kind, pattern in _EVENTS.items():
            if match := pattern.match(line):
                if kind == "failed":
                    exited = _EXITED.search(line)
                    code = int(exited[1]) if exited else 1
                    self.exit_code = 128 - code if code < 0 else code
                    if not exited:
                        self.errors.append(line.removeprefix("ERROR: "))
                return Event(kind, match[1], line)
        if line.startswith(("ERROR: ", "WARNING: ")) or _NOISE.match(line):
            if line.startswith("ERROR: "):
                self.errors.append(line.removeprefix("ERROR: "))
            return None
        return Event("line", current, line)

    def _lines(self, pipe: IO[bytes], tick_s: float) -> Iterator[str | None]:
        """Lines as they come, and None when time passed without one."""
        buffer = b""
        while True:
            ready, _, _ = select.select([pipe], [], [], tick_s or 1.0)
            self._enforce()
            if not ready:
                if tick_s:
                    yield None
                continue
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace").rstrip("\r").rsplit("\r", 1)[-1]
        if buffer:
            yield buffer.decode(errors="replace")

    # Signals

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            self._signalled = time.monotonic() - GRACE_S  # asked twice: do not wait any longer
        elif not self._signal:
            self._signal, self._signalled = number, time.monotonic()
            self._forward()

    def _forward(self) -> None:
        """SIGTERM to the stage below DVC's shell (it saves its state), or to DVC itself between stages."""
        import psutil

        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            stages = list(_below_shells(psutil.Process(self._process.pid)))
            for process in stages or [psutil.Process(self._process.pid)]:
                process.send_signal(signal.SIGTERM)

    def _enforce(self) -> None:
        """End what does not end: a stage after the grace, or what DVC's death left behind."""
        assert self._process is not None
        dead = self._process.poll() is not None
        if dead and not self._signalled:
            self._signalled = time.monotonic() - GRACE_S + REST_S
            self._kill(signal.SIGTERM)
        elif self._signalled and time.monotonic() - self._signalled > GRACE_S:
            self._kill(signal.SIGKILL)

    def _kill(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _wait(self) -> int:
        assert self._process is not None
        try:
            return self._process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill(signal.SIGKILL)
            return self._process.wait()

    def _end(self) -> None:
        """Whatever happened, neither DVC nor a stage of it is alive after this."""
        assert self._process is not None
        if self._process.poll() is None and sys.exc_info()[0] is not None:
            self._forward()
        self._wait()
        self._kill(signal.SIGKILL)


def _below_shells(process: psutil.Process) -> Iterator[psutil.Process]:
    """Children of a process, and in place of a shell its own children."""
    for child in process.children():
        if child.name() in _SHELLS:
            yield from _below_shells(child)
        else:
            yield child
