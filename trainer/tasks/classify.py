"""Classification of texts: cross-entropy with label smoothing and class weights; a unit is a row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.tasks.base import Batch, Task, balanced_weights, summarise_labels, tally_labels

# A batch is padded to a multiple of this many tokens: few distinct shapes, and vector-friendly ones.
ROUND = 8


class LabelTask(Task):
    """What tasks share whose target is one label per row."""

    metric = "accuracy"
    direction = "maximize"

    def __init__(self, params: Params, dataset: Dataset) -> None:
        super().__init__(params, dataset)
        self.weights: Tensor | None = None
        if params.train.class_weights == "balanced":
            self.weights = balanced_weights(np.asarray(self.split("train").labels), self.spec.num_labels)

    def units(self, batch: Batch) -> int:
        """Number of rows."""
        return len(batch["targets"])

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`, summed over rows."""
        logits = self.forward(model, batch).float()
        weights = None if self.weights is None else self.weights.to(logits.device)
        smoothing = self.params.train.label_smoothing
        loss = cross_entropy(logits, batch["targets"], weights, reduction="sum", label_smoothing=smoothing)
        return {"cross_entropy": loss}

    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum of losses (unweighted, not smoothed) and the confusion matrix."""
        losses = cross_entropy(logits, batch["targets"], reduction="none")
        return tally_labels(losses, logits, batch["targets"])

    def summarise(self, split: str, total: Tensor) -> dict[str, float]:
        """`loss`, `accuracy` and `macro_f1`."""
        return summarise_labels(total, self.spec.num_labels)


class Classify(LabelTask):
    """Texts to labels. Inputs are int64 (rows, longest of the batch), padded with 0; targets int64 (rows)."""

    name = "classify"

    def __init__(self, params: Params, dataset: Dataset) -> None:
        super().__init__(params, dataset)
        self._lengths: dict[str, np.ndarray] = {}

    def lengths(self, split: str) -> np.ndarray:
        """Length of each row in tokens, cut off at `max_length`."""
        if split not in self._lengths:
            lengths = np.diff(np.asarray(self.split(split).offsets))
            self._lengths[split] = np.minimum(lengths, self.spec.max_length)
        return self._lengths[split]

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """Rows at `index`, padded to the longest of them."""
        data = self.split(split)
        lengths, few = self.lengths(split)[index], bool(self.params.train.compile)
        tokens = pad_rows(data.tokens, data.offsets[index], lengths, self.spec.max_length, few_widths=few)
        targets = torch.from_numpy(data.labels[index].astype(np.int64))
        return {"inputs": torch.from_numpy(tokens), "targets": targets}


def pad_rows(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, max_length: int, *, few_widths: bool = False
) -> np.ndarray:
    """Rows of a packed token array as int64 (rows, width), padded with 0.

    The width is that of the longest row, rounded up to a multiple of 8 (with `few_widths`, to a power of two: each width
    is compiled for itself) but not above `max_length`, and at least 1.
    """
    longest = int(lengths.max(initial=1))
    rounded = -(-longest // ROUND) * ROUND
    if few_widths:
        rounded = max(ROUND, 1 << (longest - 1).bit_length())
    width = max(1, min(rounded, max(max_length, longest)))
    place = np.arange(width)
    inside = place < lengths[:, None]
    taken = np.zeros((len(lengths), width), np.int64)
    taken[inside] = tokens[(starts[:, None] + place)[inside]]
    return taken
