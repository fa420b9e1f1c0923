"""TextCNN: convolutions of several widths over token embeddings, max-pooled over the text (Kim 2014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import PAD, Spec
from trainer.config.model import TextCNN as Config


class TextCNN(nn.Module):
    """tokens (batch, length) -> logits (batch, labels)."""

    def __init__(self, config: Config, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.dim, padding_idx=PAD)
        # Full padding: a text shorter than the widest filter still has a window for it.
        self.convs = nn.ModuleList(
            nn.Conv1d(config.dim, config.filters, size, padding=size - 1) for size in config.sizes
        )
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.filters * len(config.sizes), num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (batch, length), padded with 0 at the end to logits (batch, labels)."""
        embedded = self.embedding(tokens).transpose(1, 2)
        # Windows of nothing but padding give relu(bias), the same whatever the padding's length.
        pooled = [torch.relu(conv(embedded)).amax(dim=2) for conv in self.convs]
        logits: Tensor = self.output(self.dropout(torch.cat(pooled, dim=1)))
        return logits


def build(config: Config, spec: Spec) -> nn.Module:
    """A model for `spec.vocab_size` tokens and `spec.num_labels` labels."""
    return TextCNN(config, spec.vocab_size, spec.num_labels)
