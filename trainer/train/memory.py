"""Too little memory in a step: make do with less, on all ranks together, and keep the step's batch exactly as it was.

The ladder of `train.out_of_memory=adapt`: half the micro-batch, and so twice as many of them, again and again; then
recompute activations; then the optimizer's state in the host's memory (on GPUs). The step that failed is begun again. Where
ranks meet inside of the forward and backward passes, or where the weights may be half changed, one that has failed cannot
tell the others in time: then the job starts again from its newest checkpoint, and finds in the scratch folder what was
learnt. What was learnt stays: it is part of `Progress`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from trainer import log, storage
from trainer.config import Train
from trainer.config.train_parts import Recompute
from trainer.errors import ConfigError, OutOfMemory
from trainer.parallel.plan import Plan
from trainer.tasks.base import Task
from trainer.train import offload, recompute
from trainer.train.device import give_pages_back
from trainer.train.state import Progress

LEARNT = "memory.json"
MORE = "take shorter examples (data.max_length), a smaller model, or more memory; on several GPUs, parallel.zero=3"
# How torch says that memory is short where it has no class for it.
_SHORTAGE = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate", "ALLOC_FAILED")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Made = TypeVar("Made")


class Again(Exception):
    """The step is to be begun again."""


class Memory:
    """The memory of a run.

    Args:
        train: the section.
        task: says how large an evaluation's batches are at first.
        model: as it is trained.
        optimizer: its optimizer.
        plan: the ranks that train along, and this one's device.
        folder: where what was learnt is kept for a restart; None where there is no scratch folder.
        what: the name that messages use.

    Raises:
        ConfigError: the section asks for what this machine cannot do.
    """

    def __init__(
        self,
        train: Train,
        task: Task,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        folder: Path | None,
        what: str,
    ) -> None:
        self.train, self.task, self.model, self.optimizer, self.plan = train, task, model, optimizer, plan
        self.ranks, self.device, self.folder, self.what = plan.ranks, plan.device, folder, what
        self._offloaded, self._recomputed = False, train.recompute.mode != "none"
        if train.offload == "optimizer":
            self._offload()
        self._before = 0
        if train.memory_gb:
            self._before = limit(plan.device, train.memory_gb)

    # -- how much at a time -----------------------------------------------------------------------------------------

    def micro_batch(self, now: Progress) -> int:
        """Examples of a micro-batch of one rank."""
        return min(now.memory.get("micro_batch", self.train.batch_size), -(-now.block // self.plan.size))

    def evaluation_batch(self, now: Progress) -> int:
        """Examples of a batch of an evaluation."""
        return now.memory.get("evaluation_batch", self.task.evaluation_batch())

    # -- shortage ---------------------------------------------------------------------------------------------------

    def attempt(self, now: Progress, work: Callable[[], Made], adapt: Callable[[Progress], None]) -> Made | None:
        """What `work` gives; None if memory was too short for it. All ranks are to agree on that before they go on.

        Args:
            now: the state of the run.
            work: what may need too much.
            adapt: has it need less the next time.

        Raises:
            ConfigError: memory was too short, and `train.out_of_memory` is `stop`.
            OutOfMemory: memory was too short where ranks meet inside of `work`.
        """
        made: Made | None = None
        try:
            made = work()
            short = self._over_budget()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            # Not the error itself: its frames hold on to what has filled the memory.
            short = str(error).split("\n")[0]
        if not short:
            return made
        if self.train.out_of_memory == "stop":
            size, number = self.train.batch_size // 2, self.train.accumulation * 2
            fix = f"train.batch_size={size} train.accumulation={number}, or train.out_of_memory=adapt" if size else MORE
            raise ConfigError(f"{self.what}: too little memory: {short}", fix)
        if self.plan.lockstep and self.ranks.size > 1:
            self._restart(now, adapt)
        return None

    def adapt(self, now: Progress) -> None:
        """Make do with less in a step; every rank does the same.

        Raises:
            ConfigError: there is nothing left to try.
        """
        size = self.micro_batch(now)
        if size > 1:
            now.memory["micro_batch"] = size // 2
            self._say(now, f"micro-batches of {size // 2} instead of {size}, and more of them in a step")
        elif not self._recomputed and isinstance(getattr(self.model, "blocks", None), torch.nn.ModuleList):
            now.memory["recompute"] = 1
            self._say(now, "activations of blocks are recomputed in the backward pass")
        else:
            self.adapt_update(now)

    def adapt_update(self, now: Progress) -> None:
        """Make do with less where the weights are updated; every rank does the same.

        Raises:
            ConfigError: there is nothing left to try.
        """
        if self._offloaded or self.device.type != "cuda":
            raise self._exhausted(now, f"step {now.step + 1}")
        now.memory["offload"] = 1
        self._say(now, "the optimizer's state is kept in the host's memory")

    def adapt_evaluation(self, now: Progress) -> None:
        """Make do with less in an evaluation.

        Raises:
            ConfigError: there is nothing left to try.
        """
        size = self.evaluation_batch(now)
        if size == 1:
            raise self._exhausted(now, "an evaluation")
        now.memory["evaluation_batch"] = size // 2
        self._say(now, f"evaluations in batches of {size // 2} instead of {size}")

    @contextmanager
    def update(self, now: Progress) -> Iterator[None]:
        """Around an update of the weights: some may be changed and others not when memory is found to be too short.

        Raises:
            OutOfMemory: memory was too short inside.
        """
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            if self.train.out_of_memory == "stop" or not is_shortage(error):
                raise
        self._restart(now, self.adapt_update)

    def _restart(self, now: Progress, adapt: Callable[[Progress], None]) -> NoReturn:
        """This rank cannot ask the others: what was learnt is written down, and the job starts again with it.

        Raises:
            OutOfMemory: always, but where there is no folder to write to.
            ConfigError: there is none, or nothing left to try.
        """
        adapt(now)
        message = f"{self.what}: too little memory at step {now.step + 1}, where the step cannot be begun again"
        if not self.folder:
            raise ConfigError(message, MORE)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(self.folder / LEARNT, json.dumps(now.memory).encode())
        raise OutOfMemory(message, "the same command goes on from the newest checkpoint with less")

    def recall(self, now: Progress) -> None:
        """Begin with what was learnt: by the run that this one resumes, or by the attempt before this one."""
        found: dict[str, int] = {}
        if self.ranks.rank == 0 and self.folder:
            with suppress(OSError, ValueError):
                found = json.loads((self.folder / LEARNT).read_text(encoding="utf-8"))
        learnt = {**now.memory}
        for name, value in self.ranks.from_first(found).items():
            learnt[name] = min(value, learnt.get(name, value))
        if learnt != now.memory:
            now.memory = learnt
            done = ", ".join(f"{name}={value}" for name, value in learnt.items())
            now.history.append({"step": now.step, "event": f"started again with less memory: {done}"})
        self._apply(now)

    def _say(self, now: Progress, done: str) -> None:
        done = f"too little memory at step {now.step + 1}: {done}"
        now.history.append({"step": now.step, "event": done})
        if self.ranks.rank == 0:
            log.say(f"{self.what}: {done}")
        self._apply(now)
        self._release()

    def _apply(self, now: Progress) -> None:
        if now.memory.get("recompute") and not self._recomputed:
            recompute.apply(self.model, Recompute(mode="blocks"))
            self._recomputed = True
        if now.memory.get("offload") and not self._offloaded:
            self._offload()

    def _offload(self) -> None:
        offload.install(self.optimizer, self.device)
        self._offloaded = True

    def _exhausted(self, now: Progress, where: str) -> ConfigError:
        tried = [f"micro-batches of {self.micro_batch(now)}"]
        if self._recomputed:
            tried.append("recomputed activations")
        if self._offloaded:
            tried.append("the optimizer's state in the host's memory")
        budget = (
            f"train.memory_gb: {self.train.memory_gb:g} GB are" if self.train.memory_gb else f"{self.what}: memory is"
        )
        return ConfigError(f"{budget} too little for {where}, with {' and '.join(tried)}", MORE)

    # -- a budget ---------------------------------------------------------------------------------------------------

    def _over_budget(self) -> str:
        """By how much the process has grown, if that is more than the budget; on a GPU the allocator sees to it."""
        if not self.train.memory_gb or self.device.type != "cpu":
            return ""
        grown = (resident("VmHWM") - self._before) / 1e9
        return f"the process has grown by {grown:.2f} GB" if grown > self.train.memory_gb else ""

    def _release(self) -> None:
        """Give back what torch and the C library hold in reserve, and forget the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.train.memory_gb:
            give_pages_back()
            forget_peak()


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory is short."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _SHORTAGE)


def limit(device: torch.device, gigabytes: float) -> int:
    """Have the process keep to a budget, as far as the system can; the bytes that it has now, on a CPU.

    Raises:
        ConfigError: the peak cannot be measured here, or the GPU has not that much.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if gigabytes * 1e9 > total:
            raise ConfigError(
                f"train.memory_gb: the GPU has {total / 1e9:.1f} GB", "set it to less, or to 0 for all of it"
            )
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, device)
        return 0
    try:
        forget_peak()
        return resident("VmRSS")
    except OSError:
        raise ConfigError(
            "train.memory_gb: this system does not say how much memory a process takes", "leave it 0"
        ) from None


def resident(name: str) -> int:
    """Bytes of this process that are in memory (`VmRSS`), or were at most since `forget_peak` (`VmHWM`)."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Measure the peak from here on (Linux, proc(5))."""
    CLEAR.write_text("5", encoding="ascii")
