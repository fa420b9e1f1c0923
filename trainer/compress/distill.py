"""Knowledge distillation (Hinton, Vinyals and Dean 2015): a student learns the softened distribution of its teachers.

    loss = (1 - alpha) x task loss + alpha x T^2 x KL(teacher at T || student at T)

T^2 keeps the size of the teacher's gradient when T changes. Several teachers are the weighted mean of their
distributions. As a task around a task it trains with the same `fit` as everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from trainer.config.stages import Distill
from trainer.tasks.base import Batch, Task, evaluating, to_device
from trainer.tasks.wrapped import Given, Wrapped

# The teachers' distributions of all training rows are kept in memory up to this many bytes.
MAX_BYTES = 512 << 20


@dataclass(frozen=True)
class Ensemble:
    """Teachers and their weights, which sum to 1. `order` puts each teacher's labels into the dataset's order."""

    models: Sequence[nn.Module]
    weights: Sequence[float]
    orders: Sequence[Sequence[int] | None]

    def distribution(self, task: Task, batch: Batch, temperature: float) -> Tensor:
        """The teachers' mean distribution at a temperature, the shape of the logits."""
        total: Tensor | None = None
        for model, weight, order in zip(self.models, self.weights, self.orders, strict=True):
            with evaluating(model):
                logits = task.forward(model, batch).float()
            if order is not None:
                logits = logits[..., torch.as_tensor(order, device=logits.device)]
            part = weight * torch.softmax(logits / temperature, dim=-1)
            total = part if total is None else total + part
        assert total is not None
        return total


class Distilled(Wrapped):
    """The base task with the teachers' part in its losses; its metrics are the base's.

    Where a training row looks the same in every epoch, the teachers are asked once for each row, before training.
    """

    def __init__(self, base: Task, teachers: Ensemble, config: Distill) -> None:
        super().__init__(base)
        self.teachers = teachers
        self.alpha, self.temperature = config.alpha, config.temperature
        self._known = self._ask_once() if config.alpha > 0 and _is_fixed(base) else None

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """The examples at `index`; in training, with the teachers' distribution as `teacher` where it is known."""
        batch = self.base.batch(split, index)
        if split == "train" and self._known is not None:
            batch["teacher"] = self._known[torch.from_numpy(np.asarray(index, np.int64))]
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The base's terms, weighted by 1 - alpha, and `distillation`; each a sum over the batch's units."""
        logits = self.base.forward(model, batch).float()
        terms = {}
        if self.alpha < 1:
            hard = self.base.losses(Given(logits), batch)
            terms = {name: (1.0 - self.alpha) * term for name, term in hard.items()}
        if self.alpha > 0:
            wanted = batch.get("teacher")
            if wanted is None:
                device = logits.device
                for teacher in self.teachers.models:
                    teacher.to(device)
                wanted = self.teachers.distribution(self.base, batch, self.temperature)
            soft = torch.log_softmax(logits / self.temperature, dim=-1)
            rows = kl_div(soft, wanted, reduction="none").sum(-1)
            targets = batch["targets"]
            if rows.shape == targets.shape:
                rows = rows * (targets >= 0)  # a language model has no target after the end of a document's split
            terms["distillation"] = self.alpha * self.temperature**2 * rows.sum()
        return terms

    def _ask_once(self) -> Tensor | None:
        count, classes = self.base.num_examples("train"), self.spec.num_labels
        if count * classes * 4 > MAX_BYTES:
            return None
        device = next(self.teachers.models[0].parameters()).device
        known = torch.empty(count, classes)
        lengths = self.base.lengths("train")
        order = np.arange(count) if lengths is None else np.argsort(lengths, kind="stable")
        for start in range(0, count, 256):
            index = order[start : start + 256]
            batch = to_device(self.base.batch("train", index), device)
            known[torch.from_numpy(index)] = self.teachers.distribution(self.base, batch, self.temperature).cpu()
        return known


def _is_fixed(task: Task) -> bool:
    """Whether a training row has one label and is the same in every epoch."""
    inner = task
    while isinstance(inner, Wrapped):
        inner = inner.base
    return task.spec.num_labels > 0 and type(inner).augment is Task.augment
