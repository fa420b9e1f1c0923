"""A task around a task: what changes a part of another one (its rows, its losses) overrides just that part."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import Split
from trainer.tasks.base import Batch, Task


class Wrapped(Task):
    """Does all as `base` does it."""

    def __init__(self, base: Task) -> None:
        self.base = base
        self.name, self.metric, self.direction = base.name, base.metric, base.direction
        self.params, self.dataset, self.spec, self.unit = base.params, base.dataset, base.spec, base.unit

    def split(self, name: str) -> Split:
        """A split of the dataset."""
        return self.base.split(name)

    def num_examples(self, split: str) -> int:
        """Number of examples of a split."""
        return self.base.num_examples(split)

    def lengths(self, split: str) -> np.ndarray | None:
        """Cost of each example; None where all cost the same."""
        return self.base.lengths(split)

    def augment(self, batch: Batch, rng: np.random.Generator, first: int = 0) -> Batch:
        """A randomly changed copy of a training batch."""
        return self.base.augment(batch, rng, first)

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """The examples at `index`."""
        return self.base.batch(split, index)

    def units(self, batch: Batch) -> int:
        """Number of units of a batch."""
        return self.base.units(batch)

    def evaluation_batch(self) -> int:
        """Examples of a batch of an evaluation."""
        return self.base.evaluation_batch()

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits."""
        return self.base.forward(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms, each a sum over the batch's units."""
        return self.base.losses(model, batch)

    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """What `summarise` needs to know of a batch."""
        return self.base.tally(logits, batch)

    def summarise(self, split: str, total: Tensor) -> dict[str, float]:
        """Metrics of a split from its total tally."""
        return self.base.summarise(split, total)


class FewerRows(Wrapped):
    """Trains on at most `rows` examples: the first of a fixed permutation, in the dataset's order."""

    def __init__(self, base: Task, rows: int) -> None:
        super().__init__(base)
        count = base.num_examples("train")
        self.chosen = np.sort(np.random.default_rng(0).permutation(count)[:rows])

    def num_examples(self, split: str) -> int:
        """Number of examples of a split."""
        return len(self.chosen) if split == "train" else self.base.num_examples(split)

    def lengths(self, split: str) -> np.ndarray | None:
        """Cost of each example; None where all cost the same."""
        found = self.base.lengths(split)
        return found[self.chosen] if split == "train" and found is not None else found

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """The examples at `index`."""
        return self.base.batch(split, self.chosen[index] if split == "train" else index)


class Given(nn.Module):
    """A module that returns given logits: a task's own losses on logits that were computed already."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: Tensor) -> Tensor:
        """The given logits."""
        return self.logits
