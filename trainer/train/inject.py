"""Faults on purpose, for tests: `MILLRACE_FAULT=nan-loss@17,oom@23:rank1:over4` (as torchft's event injector does).

    KIND@STEP[:rankN][:overN]

The fault happens in step STEP (from 1), on rank N or on all, once; with `over`, from that step on whenever a micro-batch
has more than N examples. Kinds: `nan-input`, `nan-loss`, `nan-gradient`, `oom` (out of memory in the forward pass),
`abort` (SIGABRT), `kill` (SIGKILL). Nothing of this is at work where the variable is not set.
"""

from __future__ import annotations

import copy
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.tasks.base import Batch, Task

VARIABLE = "MILLRACE_FAULT"
KINDS = ("nan-input", "nan-loss", "nan-gradient", "oom", "abort", "kill")
_FORM = re.compile(r"([a-z-]+)@(\d+)(?::rank(\d+))?(?::over(\d+))?")


@dataclass
class Fault:
    """One fault; `rank` and `over` are -1 where they were not given."""

    kind: str
    step: int
    rank: int = -1
    over: int = -1

    def due(self, step: int, examples: int) -> bool:
        """Whether it is to happen now; unless it has `over`, it will not happen again."""
        if self.over >= 0:
            return step >= self.step and examples > self.over
        if step == self.step:
            self.step = -1
            return True
        return False


def parse(text: str, rank: int) -> list[Fault]:
    """The faults of a rank.

    Raises:
        ConfigError: the text is not of the form above.
    """
    faults = []
    for word in filter(None, text.split(",")):
        form = _FORM.fullmatch(word)
        if form is None or form[1] not in KINDS:
            raise ConfigError(f"{VARIABLE}: {word!r} is no fault", "use KIND@STEP, such as nan-loss@17, or unset it")
        fault = Fault(form[1], int(form[2]), *(int(part) if part else -1 for part in form.groups()[2:]))
        if fault.rank in (-1, rank):
            faults.append(fault)
    return faults


def faulty(task: Task, rank: int, step: Callable[[], int]) -> Task:
    """The task itself; where `MILLRACE_FAULT` is set, a copy of it that is at fault in the given steps.

    Args:
        task: what is learned.
        rank: this rank.
        step: tells the step that is being made, from 1.
    """
    faults = parse(os.environ.get(VARIABLE, ""), rank)
    if not faults:
        return task
    found = copy.copy(task)
    found.__class__ = type("Faulty", (_Faulty, type(task)), {"faults": faults, "step": staticmethod(step)})
    return found


class _Faulty(Task):
    faults: list[Fault]
    step: Callable[[], int]

    def batch(self, split: str, index: np.ndarray) -> Batch:
        batch = super().batch(split, index)  # type: ignore[safe-super]
        if split == "train" and self._due("nan-input", len(index)):
            inputs = batch["inputs"]
            batch["inputs"] = torch.where(torch.zeros(inputs.shape) == 0, torch.nan, inputs.float())
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        examples = len(batch["targets"])
        for kind, number in (("abort", signal.SIGABRT), ("kill", signal.SIGKILL)):
            if self._due(kind, examples):
                os.kill(os.getpid(), number)
        if self._due("oom", examples):
            raise torch.OutOfMemoryError(f"injected: {examples} examples")
        terms = super().losses(model, batch)  # type: ignore[safe-super]
        first = next(iter(terms.values()))
        if self._due("nan-loss", examples):
            terms["injected"] = first * torch.nan
        if self._due("nan-gradient", examples):
            # Its value is 0, its gradient is not finite.
            terms["injected"] = torch.sqrt(first * 0.0)
        return terms

    def _due(self, kind: str, examples: int) -> bool:
        return any(fault.kind == kind and fault.due(self.step(), examples) for fault in self.faults)
