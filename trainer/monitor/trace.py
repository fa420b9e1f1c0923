"""A trace of some steps by torch.profiler, as a Chrome trace of each rank: what ran when, on the CPU and on the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer import log
from trainer.config import Params
from trainer.errors import redact


class Tracer:
    """The trace of a run; what fails here is said once, and ends no run.

    Args:
        params: `train.trace` says which steps, `monitor.folder` where to.
        rank: of this process; it is in the name of the file.
    """

    def __init__(self, params: Params, rank: int) -> None:
        self._first, self._last = params.train.trace.start, params.train.trace.start + params.train.trace.steps - 1
        self._path = Path(params.monitor.folder) / f"trace-rank-{rank}.json"
        self._rank = rank
        self._profiler: Any = None
        self._done = not self._first

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; one that is begun again, with less memory, is in the trace as often."""
        if self._done or (number != self._first and self._profiler is None):
            yield
            return
        if self._profiler is None:
            self._begin()
        with torch.profiler.record_function(f"train step {number}"):
            yield
        if number == self._last:
            self.close(ok=True)

    def close(self, ok: bool) -> None:
        """The run is over: write what there is, unless it has failed or has to leave."""
        if self._done:
            return
        self._done = True
        profiler, self._profiler = self._profiler, None
        try:
            if profiler is not None:
                profiler.stop()
            if ok and profiler is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(self._path))
                self._say(f"{self._path} has a trace of steps from {self._first} on, for chrome://tracing or Perfetto")
            elif ok:
                self._say(f"train.trace: this run did not come to step {self._first}, so there is no trace")
        except Exception as error:  # whatever the profiler or the disk has: it is not worth a run
            self._failed(error)

    def _begin(self) -> None:
        if not torch.cuda.is_available():
            # Else Kineto says on stderr, as an error, that there is no GPU. Where there is one, its errors matter.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        try:
            profiler = torch.profiler.profile()
            profiler.start()
            self._profiler = profiler
        except Exception as error:  # whatever the profiler or the driver has
            self._done = True
            self._failed(error)

    def _say(self, message: str) -> None:
        if self._rank == 0:
            log.say(message)

    def _failed(self, error: Exception) -> None:
        said = (str(error).splitlines() or [""])[0]
        log.say(
            f"train.trace: no trace of rank {self._rank}: {redact(f'{type(error).__name__}: {said}')}; the run goes on"
        )
