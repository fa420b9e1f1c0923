"""Language modelling: predict the next token of documents laid end to end; a unit is a predicted token."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.artifacts.dataset import PAD
from trainer.models.stack import Stack
from trainer.tasks.base import Batch, Task, bits_per_byte
from trainer.tasks.token_loss import IGNORE, token_loss

# Bytes of the logits of a batch of an evaluation: with the vocabulary of GPT-2, one window of 1,024 tokens.
LOGITS_BYTES = 256_000_000


class LanguageModel(Task):
    """Windows of `max_length` tokens of the split, side by side: each token but the split's first is a target once.

    Inputs are int64 (windows, max_length), the last window padded with 0; targets are the same moved on by one, with
    -100 where there is none.
    """

    name = "lm"
    metric = "bits_per_byte"
    direction = "minimize"
    unit = "tokens"

    def num_examples(self, split: str) -> int:
        """Number of windows."""
        return max(1, -(-(len(self.split(split).tokens) - 1) // self.spec.max_length))

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """Windows at `index`."""
        tokens = self.split(split).tokens
        width = self.spec.max_length
        place = index[:, None] * width + np.arange(width + 1)
        window = np.where(place < len(tokens), tokens[np.minimum(place, len(tokens) - 1)], PAD).astype(np.int64)
        targets = np.where(window[:, 1:] == PAD, IGNORE, window[:, 1:])
        return {"inputs": torch.from_numpy(window[:, :-1].copy()), "targets": torch.from_numpy(targets)}

    def units(self, batch: Batch) -> int:
        """Number of predicted tokens."""
        return int((batch["targets"] != IGNORE).sum())

    def evaluation_batch(self) -> int:
        """As many windows as keep their logits, float32, below `LOGITS_BYTES`."""
        most = LOGITS_BYTES // (4 * self.spec.max_length * self.spec.vocab_size)
        return max(1, min(super().evaluation_batch(), most))

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`, summed over predicted tokens."""
        finish = partial(token_loss, targets=batch["targets"], smoothing=self.params.train.label_smoothing)
        if isinstance(model, Stack):
            return {"cross_entropy": model(batch["inputs"], finish=finish)}
        return {"cross_entropy": finish(self.forward(model, batch), None)}

    def tally(self, logits: Tensor, batch: Batch) -> Tensor:
        """[sum of losses in nats, predicted tokens]."""
        targets = batch["targets"].flatten()
        nats = cross_entropy(logits.flatten(0, 1), targets, reduction="none", ignore_index=IGNORE).double().sum()
        return torch.stack([nats, (targets != IGNORE).sum().double()])

    def summarise(self, split: str, total: Tensor) -> dict[str, float]:
        """`loss` (nats per token), `perplexity` (of a token) and `bits_per_byte` (of the split's UTF-8 text)."""
        nats, tokens = float(total[0]), float(total[1])
        num_bytes = float(self.dataset.meta["bytes"][split])
        loss = nats / max(tokens, 1.0)
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte(nats, num_bytes)}
