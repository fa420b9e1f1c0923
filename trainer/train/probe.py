"""`auto` of train.precision, train.compile and train.threads: a few steps of the real model on a real batch decide.

Each candidate makes some forward and backward passes of a copy of the model, in turn with the others, so that what else
the machine does hits all alike. Compilation is tried only where the rest of the run could pay for it, and taken where it
does. Rank 0 measures and all ranks do as it says. What was found is kept for the next run on the same host, and in the
scratch folder for the run that resumes this one, which must go on with the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer import log, storage
from trainer.config import Params, Train
from trainer.errors import MillraceError, Preempted
from trainer.parallel.group import Ranks
from trainer.tasks.base import Batch, Task, to_device
from trainer.train import device as devices
from trainer.train.memory import is_shortage
from trainer.train.preempt import Preemption
from trainer.train.state import rng_state, set_rng_state
from trainer.train.wrapped import compile_blocks

ROUNDS = 5
# A lower precision must be faster by this factor, and compilation earn this many times what it costs.
GAIN, RETURN = 1.05, 1.5
# Seconds that compilation is taken to cost before it is tried.
COMPILE_S = 20.0
CHOICE = "choice.json"
# Linux: nanoseconds that this thread ran, and that it waited for a processor, and how often. Where it waited for a larger
# share of the time, other work had a say in what is fastest, and it is not remembered for runs that have the host alone.
SCHEDSTAT = Path("/proc/thread-self/schedstat")
MOST_WAITED = 0.1


@dataclass(frozen=True)
class Way:
    """One way to do a step."""

    precision: str
    compile: bool
    threads: int

    def __str__(self) -> str:
        parts = [self.precision, *(["compiled"] if self.compile else [])]
        return " ".join([*parts, f"{self.threads} threads"] if self.threads else parts)


def settle(
    params: Params,
    task: Task,
    model: nn.Module,
    ranks: Ranks,
    device: torch.device,
    preemption: Preemption,
    folder: Path | None,
    what: str,
) -> Params:
    """The parameters with a decision in place of each `auto`; all ranks get the same, and their generators are untouched.

    Args:
        params: of the run.
        task: gives the batch.
        model: as it was built; it is copied. Only that of rank 0 counts.
        ranks: that train along.
        device: this rank's.
        preemption: SIGTERM ends the measuring at once, also while something is compiled.
        folder: of the run's checkpoints; None where there is none.
        what: the name that messages use.

    Raises:
        Preempted: SIGTERM arrived at one of the ranks.
    """
    train = params.train
    if "auto" not in (train.precision, train.compile, train.threads):
        return params
    probe = Probe(params, task, model, ranks.size, device, folder)
    work, found = (probe.run() if ranks.rank == 0 else iter(())), None
    state = rng_state(device)
    while found is None:
        # A candidate at a time: the others wait for no longer than one takes.
        if ranks.rank == 0:
            found = preemption.until_asked(lambda: next(work))
        answers = ranks.gather((found, preemption.asked))
        if any(asked for _, asked in answers):
            raise Preempted(f"{what}: SIGTERM while `auto` was measured", "run the same command again")
        found = answers[0][0]
    set_rng_state(state, device)
    way, why = found
    if ranks.rank == 0:
        log.say(f"{what}: auto: {why}")
    chosen = {"precision": way["precision"], "compile": way["compile"], "threads": way["threads"]}
    torch.set_num_threads(way["threads"] or devices.num_threads(train))
    if way["compile"] and train.deterministic:
        devices.set_deterministic(True, True)
    return params.model_copy(update={"train": train.model_copy(update=chosen)})


class Probe:
    """The measurement, on rank 0."""

    def __init__(
        self, params: Params, task: Task, model: nn.Module, num_ranks: int, device: torch.device, folder: Path | None
    ) -> None:
        self.train, self.task, self.model, self.device, self.folder = params.train, task, model, device, folder
        examples, block = task.num_examples("train"), params.train.batch_size * params.train.accumulation * num_ranks
        steps = self.train.max_steps or max(self.train.min_steps, self.train.epochs * math.ceil(examples / block))
        self.passes = steps * self.train.accumulation
        self.models: dict[bool, nn.Module] = {}
        self.compile_s = 0.0

    def run(self) -> Iterator[tuple[dict[str, Any], str] | None]:
        """Measures a candidate at each call; at the end the choice, and the words for it."""
        kept = self._kept()
        if kept is not None:
            yield kept
            return
        size = min(self.train.batch_size, self.task.num_examples("train"))
        began, waited = time.monotonic(), _waited_s()
        while True:
            times: dict[Way, float] = {}
            try:
                for found in self._measure(self._batch(size)):
                    times = found
                    yield None
                break
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error) or size == 1:
                    raise
                size //= 2
            finally:
                self.models.clear()
                torch.set_num_threads(devices.num_threads(self.train))
        way, why = self._choose(times)
        alone = _waited_s() - waited <= MOST_WAITED * (time.monotonic() - began)
        self._keep((way, why), self._cache() if alone else None)
        yield way, why if alone else f"{why}, beside other work: measured again next time"

    # -- measuring --------------------------------------------------------------------------------------------------

    def _measure(self, batch: Batch) -> Iterator[dict[Way, float]]:
        """Seconds of a pass by each way, after each new figure."""
        times: dict[Way, float] = {}
        for times in self._race(self._plain(), batch):
            yield times
        best = min(times, key=lambda way: times[way])
        hopeful = self.passes * times[best] * 0.5 > COMPILE_S * RETURN
        if self.train.compile == "auto" and hopeful and _has_compiler(self.device):
            way = Way(best.precision, True, best.threads)
            start = time.monotonic()
            self._pass(way, batch)
            self.compile_s = time.monotonic() - start
            yield times
            for raced in self._race([best, way], batch):
                yield times | raced

    def _race(self, ways: list[Way], batch: Batch) -> Iterator[dict[Way, float]]:
        """The median of some passes of each way, made in turn."""
        taken: dict[Way, list[float]] = {way: [] for way in ways}
        for way in ways:
            self._pass(way, batch)
            yield {}
        for _ in range(ROUNDS):
            for way in ways:
                if way.threads not in (0, torch.get_num_threads()):
                    # The first pass with other threads starts them: twice the time of a small model's step.
                    self._pass(way, batch)
                taken[way].append(self._pass(way, batch))
            yield {way: float(np.median(seconds)) for way, seconds in taken.items()}

    def _plain(self) -> list[Way]:
        """The ways without compilation, unless that is wanted for sure."""
        train, cores = self.train, devices.num_threads(self.train)
        precisions = ["fp32", "bf16"] if train.precision == "auto" else [train.precision]
        if train.precision == "auto" and self.device.type == "cuda":
            precisions.append("fp16")
        threads = sorted({cores, max(1, cores // 2)}, reverse=True) if train.threads == "auto" else [0]
        if self.device.type == "cuda" and train.threads == "auto":
            threads = [cores]
        # By threads, for each change of their number costs a pass more, see `_race`.
        return [Way(one, train.compile is True, number) for number in threads for one in precisions]

    def _pass(self, way: Way, batch: Batch) -> float:
        """Seconds of a forward and backward pass."""
        model = self.models.get(way.compile)
        if model is None:
            model = self.models[way.compile] = copy.deepcopy(self.model).to(self.device).train()
            if way.compile:
                compile_blocks(model)
        if way.threads:
            torch.set_num_threads(way.threads)
        _wait(self.device)
        start = time.perf_counter()
        with devices.autocast(self.train.model_copy(update={"precision": way.precision}), self.device):
            terms = self.task.losses(model, batch)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        _wait(self.device)
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def _batch(self, size: int) -> Batch:
        """A micro-batch of examples from the whole split."""
        index = np.linspace(0, self.task.num_examples("train") - 1, size).astype(np.int64)
        batch = self.task.augment(self.task.batch("train", index), np.random.default_rng(0))
        return to_device(batch, self.device)

    def _choose(self, times: dict[Way, float]) -> tuple[dict[str, Any], str]:
        """The way that takes least time over the run; the plainest of those that are about as fast."""
        plain = next(iter(times))
        best = plain
        for way, seconds in times.items():
            if way.compile == plain.compile and seconds * GAIN < times[best]:
                best = way
        words = [f"{way} {times[plain] / seconds:.2f} x" for way, seconds in times.items() if way != plain]
        for way, seconds in times.items():
            if way.compile and not plain.compile:
                saved = self.passes * (times[best] - seconds)
                words.append(f"compiling takes {self.compile_s:.0f} s and would save {max(saved, 0):.0f} s")
                if saved > RETURN * self.compile_s:
                    best = way
        told = f"{best} ({'; '.join([f'{plain} {times[plain] * 1e3:.1f} ms', *words])})"
        return {
            "precision": best.precision,
            "compile": best.compile,
            "threads": best.threads or self.train.threads,
        }, told

    # -- remembering ------------------------------------------------------------------------------------------------

    def _kept(self) -> tuple[dict[str, Any], str] | None:
        """What the run that this one resumes has chosen, or an earlier run of the same kind on this host."""
        for path, words in (
            (self.folder / CHOICE if self.folder else None, "resumed"),
            (self._cache(), "found before"),
        ):
            if path is None:
                continue
            with suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(path.read_text(encoding="utf-8"))
                result = {name: found[name] for name in ("precision", "compile", "threads")}, str(found["why"])
                if words == "found before":
                    self._keep(result, None)
                return result[0], f"{result[1]}, {words}"
        return None

    def _keep(self, result: tuple[dict[str, Any], str], cache: Path | None) -> None:
        """Remember for the run that resumes this one, and in `cache` for others."""
        content = {**result[0], "why": result[1]}
        for path in (self.folder / CHOICE if self.folder else None, cache):
            if path is not None:
                # Where it cannot be kept it is measured again.
                with suppress(OSError, MillraceError):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    storage.write_json(path, content)

    def _cache(self) -> Path:
        """The file of this kind of host, model and batch."""
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        batch = {name: list(value.shape[1:]) for name, value in self._batch(1).items()}
        train: Train = self.train
        asked = [train.precision, train.compile, train.threads, train.batch_size, train.deterministic, train.processes]
        long = int(math.log2(max(self.passes, 1)))
        kind = [_kind(self.device), torch.__version__, devices.num_threads(train), type(self.model).__name__, shapes]
        digest = hashlib.sha256(json.dumps([kind, batch, asked, long]).encode()).hexdigest()[:16]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "millrace" / f"auto-{digest}.json"


def _kind(device: torch.device) -> str:
    """What kind of processor this is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} {torch.backends.cpu.get_cpu_capability()}"
    return torch.backends.cpu.get_cpu_capability()


def _has_compiler(device: torch.device) -> bool:
    try:
        devices.check_compiler(device.type)
    except MillraceError:
        return False
    return True


def _waited_s() -> float:
    """Seconds that this thread has waited for a processor; 0 where the system does not say."""
    try:
        return int(SCHEDSTAT.read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
