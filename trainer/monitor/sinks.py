"""Where rows of figures go while a run goes on: the interface, the live file, and a thread that keeps slow sinks apart.

A row is a step and figures by name. Rows of the past may come again when a run goes on from a checkpoint: `resume` says
from where, and each sink sees to it that no row is there twice.
"""

from __future__ import annotations

import io
import json
import math
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from trainer import log
from trainer.errors import redact

Figures = Mapping[str, float]
LIVE = "live.jsonl"
# Rows that a tracker may be behind; more are left out rather than waited for.
BEHIND = 10_000
# How long the end of a run waits for trackers.
PATIENCE_S = 30.0


class Sink(Protocol):
    """Something that takes a run's rows."""

    def resume(self, step: int, evaluated: int) -> None:
        """Rows after `step` come again; that of an evaluation at `step` too, unless `evaluated` is `step`."""

    def row(self, step: int, figures: Figures) -> None:
        """Take a row."""

    def close(self, ok: bool) -> None:
        """No more rows come; `ok` says whether the run has done its work."""


class LiveFile:
    """Rows as JSON lines, each written at once: `tail -F` follows it.

    Args:
        path: the file, made with the first row; what an earlier attempt wrote after the checkpoint is cut off by `resume`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None

    def resume(self, step: int, evaluated: int) -> None:
        """Cut off the rows that come again, and a line that a kill left unfinished."""
        if not self._path.is_file():
            return
        with open(self._path, "r+b") as file:
            keep = 0
            for line in file:
                if not line.endswith(b"\n") or _comes_again(line, step, evaluated):
                    break
                keep += len(line)
            file.truncate(keep)

    def row(self, step: int, figures: Figures) -> None:
        """Append a line."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self._path, "a")
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **plain}).encode() + b"\n")

    def close(self, ok: bool) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def _comes_again(line: bytes, step: int, evaluated: int) -> bool:
    try:
        row = json.loads(line)
        at = int(row["step"])
    except (ValueError, KeyError, TypeError):
        return True
    return at > step or (at == step != evaluated and is_evaluation(row))


def is_evaluation(figures: Mapping[str, object]) -> bool:
    """Whether a row is of an evaluation."""
    return any(name.startswith("val_") for name in figures)


class Guarded:
    """Sinks whose failures end nothing: each is said once, and that sink gets no more rows."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def resume(self, step: int, evaluated: int) -> None:
        """Pass it on."""
        self._each(lambda sink: sink.resume(step, evaluated))

    def row(self, step: int, figures: Figures) -> None:
        """Pass it on."""
        self._each(lambda sink: sink.row(step, figures))

    def close(self, ok: bool) -> None:
        """Pass it on."""
        self._each(lambda sink: sink.close(ok))
        self._sinks.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # whatever a tracker's library raises: it is not worth a run
                del self._sinks[name]
                said = (str(error).splitlines() or [""])[0]
                log.say(f"{name} takes no more figures: {redact(f'{type(error).__name__}: {said}')}; the run goes on")


class Background:
    """Sinks that are called from a thread of their own, so that a slow server does not hold up training."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(BEHIND)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def resume(self, step: int, evaluated: int) -> None:
        """Pass it on, later."""
        self._later(lambda: self._sink.resume(step, evaluated))

    def row(self, step: int, figures: Figures) -> None:
        """Pass it on, later."""
        self._later(lambda: self._sink.row(step, figures))

    def close(self, ok: bool) -> None:
        """Wait until all rows are passed on, but not for ever."""
        self._later(lambda: self._sink.close(ok))
        self._later(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            log.say(f"trackers are still behind after {PATIENCE_S:g} s: some figures may be missing there")
        elif self._left_out:
            log.say(f"trackers were too slow: {self._left_out} rows are missing there")

    def _later(self, call: Callable[[], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._left_out += 1

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
