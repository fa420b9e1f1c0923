"""Transformer encoder (Vaswani et al. 2017) with layer norm before each branch (Xiong et al. 2020) and mean pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from trainer.artifacts.dataset import PAD, Spec
from trainer.config.model import Encoder as Config
from trainer.models.ops import attention
from trainer.models.stack import Stack


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each a residual branch."""

    def __init__(self, dim: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, ff)
        self.down = nn.Linear(ff, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, length, dim) to the same shape; mask bool (batch, 1, 1, length), true where a key may be seen."""
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, self.width))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        attended = self.attend(query, key, value, mask)
        x = x + self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout(self.down(gelu(self.up(self.norm2(x)))))
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of each head (batch, heads, length, width), with dropout of its weights."""
        return attention(query, key, value, mask, self.dropout.p if self.training else 0.0)


class Encoder(Stack):
    """tokens int64 (batch, length <= max_length), padded with 0 at the end -> logits (batch, labels)."""

    embed_names = ("embedding", "position")
    head_names = ("norm", "output")

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.dim = config.dim
        self.embedding = nn.Embedding(spec.vocab_size, config.dim)
        self.position = nn.Embedding(spec.max_length, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.ff, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, spec.num_labels)

    def embed(self, inputs: Tensor) -> Tensor:
        """Tokens and their places as vectors (batch, length, dim)."""
        place = torch.arange(inputs.shape[1], device=inputs.device)
        embedded: Tensor = self.dropout(self.embedding(inputs) + self.position(place))
        return embedded

    def beside(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Which keys may be seen, bool (batch, 1, 1, length)."""
        return (seen(inputs)[:, None, None, :],)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Logits (batch, labels) of the mean over a text's tokens."""
        weight = seen(inputs).unsqueeze(2).to(x.dtype)
        pooled = (self.norm(x) * weight).sum(dim=1) / weight.sum(dim=1)
        logits: Tensor = self.output(pooled)
        return logits

    def stream(self, inputs: Tensor) -> tuple[int, ...]:
        """(batch, length, dim)."""
        return (*inputs.shape, self.dim)


def seen(tokens: Tensor) -> Tensor:
    """Tokens that are no padding, bool (batch, length); the first always: a softmax over an empty text would be NaN."""
    return (tokens != PAD) | (torch.arange(tokens.shape[1], device=tokens.device) == 0)


def build(config: Config, spec: Spec) -> nn.Module:
    """A model for `spec.vocab_size` tokens, texts of up to `spec.max_length` tokens and `spec.num_labels` labels."""
    return Encoder(config, spec)
