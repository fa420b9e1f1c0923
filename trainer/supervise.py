"""Run a stage again after a signal killed it: `python -m trainer STAGE --retries N --backoff SECONDS ...`.

Kubeflow's own retries do nothing with its default manifests, and elsewhere they repeat a wrong parameter as well. Here
exit codes from 128 are repeated (out of memory, a crash in a library), and permanent ones never (`trainer.errors`).
A stage that goes on from its checkpoint does so in the next attempt too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from trainer import log, signals
from trainer.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

# Somebody asked for these: an end to respect.
_ASKED = (EXIT_INTERRUPTED, EXIT_PREEMPTED)
_MAX_BACKOFF_S = 3600.0


def supervise(words: Sequence[str], retries: int, backoff_s: float) -> int:
    """Run `python -m trainer WORDS` until it ends for good; returns its last exit status.

    Args:
        words: command line without --retries and --backoff.
        retries: attempts after the first.
        backoff_s: seconds before the first retry; twice as long before each further one.
    """
    supervisor = _Supervisor(list(words))
    with signals.caught(supervisor.on_signal, signal.SIGTERM, signal.SIGINT):
        for attempt in range(retries + 1):
            status = supervisor.run()
            if status < 128 or status in _ASKED or supervisor.stopped.is_set() or attempt == retries:
                return status
            wait_s = min(backoff_s * 2**attempt, _MAX_BACKOFF_S)
            log.say(f"{words[0]}: exit code {status}; attempt {attempt + 2} of {retries + 1} in {wait_s:g} s")
            if supervisor.stopped.wait(wait_s):
                return status
    return status


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without some options and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


class _Supervisor:
    """The child that runs the stage, and the signals that are passed on to it."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.stopped = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """One attempt; its exit status, 128 + n for signal n. Nothing of it is alive afterwards."""
        # A session of its own, so that all of it can be ended; the terminal's Ctrl-C comes to us and is passed on.
        self._child = subprocess.Popen([sys.executable, "-m", "trainer", *self.words], start_new_session=True)
        if self.stopped.is_set():
            self._pass_on(signal.SIGTERM)
        try:
            status = self._child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        return 128 - status if status < 0 else status

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped.set()
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)
