"""Hashed n-gram bag (Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification").

Each n-gram of token ids is hashed to a row of one table inside `forward`, so that the model takes plain token ids and
exports to ONNX as it is. The hash is polynomial, modulo a prime below 2**31: a product of two residues stays below
2**62 and never overflows an int64, in torch or elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, pad

from trainer.artifacts.dataset import PAD, Spec
from trainer.config.model import NgramBag as Config

PRIME = 2**31 - 1
BASE = 1_000_003
MIX = 1_540_483_477


class NgramBag(nn.Module):
    """tokens (batch, length) -> logits (batch, labels): the n-grams' embeddings, pooled, then a small network."""

    def __init__(self, config: Config, num_labels: int) -> None:
        super().__init__()
        self.orders = config.orders
        self.buckets = config.buckets
        # Row 0 belongs to padding: it is zero, has no gradient and so adds nothing to a sum.
        self.table = nn.Embedding(config.buckets, config.dim, padding_idx=PAD)
        self.combiner = config.combiner
        # Small beside what training adds: rows that few texts use would otherwise drown the others in noise.
        nn.init.normal_(self.table.weight, std=0.02 if config.combiner == "mean" else 0.003)
        with torch.no_grad():
            self.table.weight[PAD].zero_()
        self.ngram_dropout = config.ngram_dropout
        self.dropout = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(config.dim, config.hidden) if config.hidden else None
        self.output = nn.Linear(config.hidden or config.dim, num_labels)

    def ngrams(self, tokens: Tensor) -> Tensor:
        """Rows of the table, int64 (batch, orders x length); 0 where an n-gram would reach into the padding."""
        rows = []
        for order in self.orders:
            hashed, last = tokens, tokens
            for shift in range(1, order):
                last = pad(tokens[:, shift:], (0, shift))
                hashed = (hashed * BASE + last + 1) % PRIME
            bucket = 1 + (hashed * MIX + order) % PRIME % (self.buckets - 1)
            rows.append(torch.where(last != PAD, bucket, torch.zeros_like(bucket)))
        return torch.cat(rows, dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (batch, length), padded with 0 at the end to logits (batch, labels)."""
        rows = self.ngrams(tokens)
        if self.training and self.ngram_dropout:
            rows = rows * (torch.rand(rows.shape, device=rows.device) >= self.ngram_dropout)
        # ONNX has no embedding bag, and neither have quantised or sharded tables, which are subclasses of a parameter.
        if torch.compiler.is_exporting() or type(self.table.weight) is not nn.Parameter:
            total = self.table(rows).sum(dim=1)
        else:
            total = embedding_bag(rows, self.table.weight, mode="sum", padding_idx=PAD)
        count = (rows != PAD).sum(dim=1, keepdim=True).clamp(min=1)
        pooled = self.dropout(total / (count if self.combiner == "mean" else count.to(total.dtype).sqrt()))
        if self.hidden is not None:
            pooled = torch.relu(self.hidden(pooled))
        logits: Tensor = self.output(pooled)
        return logits


def build(config: Config, spec: Spec) -> nn.Module:
    """A model for `spec.num_labels` labels."""
    return NgramBag(config, spec.num_labels)
