"""What the loop tells of its course, and what is made of it: rows with figures of speed, for the live file and trackers.

Figures of time differ from run to run, so they go to the sinks alone; history.jsonl keeps what the seed determines.

    with watch.part("data"): ...          # time that is counted apart: data, evaluate, checkpoint
    watch.step(units)                     # a step is done
    watch.row({"step": 20, "train_loss": ...})
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from trainer.config import Train
from trainer.monitor import statistics, utilisation
from trainer.monitor.sinks import Sink, is_evaluation
from trainer.monitor.trace import Tracer
from trainer.parallel.plan import Plan
from trainer.record import peak_memory
from trainer.tasks.base import Task

# A run that has trained for so long can spare the second in which a CPU's peak is measured.
_WORTH_MEASURING_S = 30.0


class Watch:
    """The course of a run, on rank 0; on other ranks it has no sinks, and writes nothing.

    Args:
        task: its units are what the speed is counted in.
        model: the whole model, not yet divided among ranks.
        train: precision and threads.
        device: this rank's.
        size: number of ranks.
        sinks: where rows go.
        tracer: of the run, if it may have a trace.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        train: Train,
        device: torch.device,
        size: int,
        sinks: Sequence[Sink] = (),
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self.sinks, self.device, self.size, self._train = list(sinks), device, size, train
        self._unit = task.unit
        tokens = task.unit == "tokens"
        self._flops = utilisation.flops_per_token(model, task.spec.max_length) if tokens and sinks else None
        self._peak: float | None = None
        self._begin = self._since = time.perf_counter()
        self._units = 0.0
        self._steps = 0
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within as `data`, `evaluate` or `checkpoint`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def step(self, units: float) -> None:
        """A step over `units` units of all ranks is done."""
        self._units += units
        self._steps += 1

    def traced(self, step: int) -> AbstractContextManager[None]:
        """Around step number `step`, which `train.trace` may ask to be traced."""
        return self._tracer.step(step) if self._tracer else nullcontext()

    def statistics(self, step: int, model: nn.Module, plan: Plan, scale: float) -> AbstractContextManager[None]:
        """Around the update of step number `step`: norms by block go to the sinks where `train.statistics_every` says so."""
        every = self._train.statistics_every
        if not every or step % every:
            return nullcontext()

        def put(figures: dict[str, float]) -> None:
            for sink in self.sinks:
                sink.row(step, figures)

        return statistics.measured(model, plan, scale, put)

    def resume(self, step: int, evaluated: int) -> None:
        """The run goes on after `step`, whose evaluation, if it has one, is done if `evaluated` is `step`."""
        for sink in self.sinks:
            sink.resume(step, evaluated)

    def row(self, row: Mapping[str, Any]) -> None:
        """Pass a row of the history on, one of training with the figures of speed since the last."""
        if not self.sinks:
            return
        figures = {name: float(value) for name, value in row.items() if name != "step" and value is not None}
        if not is_evaluation(row):
            figures |= self._speed()
        for sink in self.sinks:
            sink.row(int(row["step"]), figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self.sinks:
            sink.close(ok=kind is None)
        if self._tracer:
            self._tracer.close(ok=kind is None)

    def _speed(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds = max(now - self._since - self._parts.get("evaluate", 0.0), 1e-9)
        rate = self._units / seconds
        found = {
            f"{self._unit}_per_s": rate,
            "step_ms": 1e3 * seconds / max(self._steps, 1),
            "data_wait": self._parts.get("data", 0.0) / seconds,
            "checkpoint_s": self._parts.get("checkpoint", 0.0),
            "peak_memory_mb": self._memory() / 1e6,
        }
        if self._flops and (peak := self._peak_of_device(now - self._begin)):
            found["mfu"] = self._flops * rate / (peak * self.size)
        self._since, self._units, self._steps = time.perf_counter(), 0.0, 0
        self._parts.clear()
        return found

    def _memory(self) -> float:
        """Most memory that was in use on the device, bytes."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory()

    def _peak_of_device(self, trained_s: float) -> float | None:
        if self._peak is None:
            self._peak = utilisation.known_peak(self.device, self._train.precision)
            if self._peak is None and self.device.type == "cpu" and trained_s > _WORTH_MEASURING_S:
                self._peak = utilisation.measure(self._train.precision)
        return self._peak
