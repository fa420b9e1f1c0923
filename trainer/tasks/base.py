"""The interface of a task. A task knows its data and its losses; it knows nothing of optimizers, ranks or files."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import Dataset, Spec, Split
from trainer.config import Params
from trainer.errors import ConfigError, DataError

Batch = dict[str, Tensor]
# Examples of a batch of an evaluation.
EVALUATE = 256


class Task(ABC):
    """What is learned.

    A loss term is a SUM over units (rows, or tokens), so that the loop can divide by the number of units of a whole
    step, whatever its micro-batches and ranks. A tally is a float64 vector that may be added up over batches and
    ranks; `summarise` makes metrics of it.

    Attributes:
        name: its name in params.yaml.
        metric: the metric by which the best weights are chosen, without the prefix `val_`.
        direction: whether more or less of it is better, `maximize` or `minimize`.
        spec: the shape of the examples.
        unit: what a unit is called where speed is told, `examples` or `tokens`.
    """

    name: str
    metric: str
    direction: str
    unit = "examples"

    def __init__(self, params: Params, dataset: Dataset) -> None:
        if dataset.spec.task != self.name:
            raise ConfigError(
                f"task.name: {self.name!r}, but the dataset was made for {dataset.spec.task!r}",
                "run preprocess again with this configuration",
            )
        self.params = params
        self.dataset = dataset
        self.spec: Spec = dataset.spec
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """A split of the dataset, opened once.

        Raises:
            DataError: it has no rows.
        """
        if name not in self._splits:
            split = self.dataset.split(name)
            if len(split) == 0:
                raise DataError(
                    f"{self.dataset.folder}: split {name!r} has no rows", "give more data, or a larger data.split share"
                )
            self._splits[name] = split
        return self._splits[name]

    def num_examples(self, split: str) -> int:
        """Number of examples of a split: what the indices of `batch` run over."""
        return len(self.split(split))

    def lengths(self, split: str) -> np.ndarray | None:
        """Cost of each example, such as its length in tokens; None where all cost the same."""
        return None

    def order(self, split: str, rng: np.random.Generator, block: int) -> np.ndarray:
        """The order of an epoch: a permutation of the examples.

        Examples of like length are brought together in blocks of `block`, in a random order of blocks, so that little
        of a step is padding. It depends on the generator and the block only, never on the number of ranks.
        """
        count = self.num_examples(split)
        shuffled = rng.permutation(count)
        lengths = self.lengths(split)
        if lengths is None or count <= block:
            return shuffled
        window = 64 * block
        blocks: list[np.ndarray] = []
        for start in range(0, count, window):
            part = shuffled[start : start + window]
            part = part[np.argsort(lengths[part], kind="stable")]
            blocks += [part[i : i + block] for i in range(0, len(part), block)]
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])

    def augment(self, batch: Batch, rng: np.random.Generator, first: int = 0) -> Batch:
        """A randomly changed copy of a training batch; by default, the batch itself.

        Args:
            batch: examples `first`, `first` + 1, ... of a step.
            rng: the step's, in the same state for each of its micro-batches.
            first: how many of the step's examples come before; an example must be changed alike whatever batch it is in.
        """
        return batch

    @abstractmethod
    def batch(self, split: str, index: np.ndarray) -> Batch:
        """The examples at `index` as tensors on the CPU, with keys `inputs` and `targets`."""

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """Number of units (rows, or tokens) that the losses of a batch are sums over."""

    def evaluation_batch(self) -> int:
        """Examples of a batch of an evaluation, which has all of its logits at once."""
        return EVALUATE

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits."""
        logits: Tensor = model(batch["inputs"])
        return logits

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms, each a sum over the batch's units; the loop minimises their sum."""

    @abstractmethod
    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """What `summarise` needs to know of a batch: a float64 vector to be added up."""

    @abstractmethod
    def summarise(self, split: str, total: Tensor) -> dict[str, float]:
        """Metrics of a split from its total tally."""

    def total(
        self,
        model: nn.Module,
        split: str,
        batch_size: int = 0,
        shard: tuple[int, int] = (0, 1),
        poll: Callable[[], None] = lambda: None,
        lockstep: bool = False,
        tally: Callable[[Batch], Tensor] | None = None,
    ) -> Tensor:
        """The tally of a split, or of every n-th batch of it.

        Args:
            model: in whatever mode; it is put into evaluation mode for the time.
            split: train, val or test.
            batch_size: examples in a batch; 0 takes `evaluation_batch`.
            shard: (rank, ranks): this rank takes the batches rank, rank + ranks, ...
            poll: called after each batch; an exception that it raises ends the evaluation.
            lockstep: all ranks run the model equally often, since it needs them all; without a batch, for nothing.
            tally: makes the tally of a batch where the model alone cannot.
        """
        batch_size = batch_size or self.evaluation_batch()
        count = self.num_examples(split)
        lengths = self.lengths(split)
        index = np.arange(count) if lengths is None else np.argsort(lengths, kind="stable")
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        total = torch.zeros(0, dtype=torch.float64)
        with evaluating(model):
            for begin in range(0, count, batch_size * shard[1]):
                start = begin + shard[0] * batch_size
                if start >= count and not lockstep:
                    break
                rows = index[start : start + batch_size] if start < count else index[:1]
                batch = to_device(self.batch(split, rows), device)
                part = tally(batch) if tally else self.tally(self.forward(model, batch).float(), batch).cpu()
                if start < count:
                    total = part if not total.numel() else total + part
                poll()
        return total

    def evaluate(self, model: nn.Module, split: str, batch_size: int = 0) -> dict[str, float]:
        """Metrics of a split: loss and others, as each task says."""
        return self.summarise(split, self.total(model, split, batch_size))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; on the CPU, the batch itself."""
    if device.type == "cpu":
        return batch
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def balanced_weights(labels: np.ndarray, num_labels: int) -> Tensor:
    """Weight of each class, float32: inverse to its frequency, with a mean of 1 over the rows; 0 for an absent class."""
    counts = np.bincount(labels, minlength=num_labels).astype(np.float64)
    present = counts > 0
    weights = np.zeros(num_labels)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.tensor(weights, dtype=torch.float32)


def summarise_labels(total: Tensor, num_labels: int) -> dict[str, float]:
    """loss, accuracy and macro_f1 from [sum of losses, confusion matrix (true x predicted, row by row)].

    Macro-F1 is the mean over the labels that occur, as true or as predicted (as scikit-learn counts it).
    """
    confusion = total[1:].view(num_labels, num_labels)
    rows = confusion.sum()
    hits = confusion.diagonal()
    support = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * hits[support > 0] / support[support > 0]
    return {"loss": float(total[0] / rows), "accuracy": float(hits.sum() / rows), "macro_f1": float(f1.mean())}


def tally_labels(losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """[sum of losses, confusion matrix (true x predicted, row by row)] of a batch, float64."""
    num_labels = logits.shape[1]
    cells = torch.bincount(targets * num_labels + logits.argmax(1), minlength=num_labels**2)
    return torch.cat([losses.double().sum().view(1), cells.double()])


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Cross-entropy in bits per byte of text, which does not depend on the tokenizer."""
    return nats / math.log(2) / num_bytes
