"""Transformer encoder (Vaswani et al. 2017) with layer norm before each branch (Xiong et al. 2020) and mean pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from trainer.artifacts.dataset import PAD, Spec
from trainer.config.model import Encoder as Config


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each a residual branch."""

    def __init__(self, dim: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, ff)
        self.down = nn.Linear(ff, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, length, dim) to the same shape; mask bool (batch, 1, 1, length), true where a key may be seen."""
        batch, length, dim = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout.p if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        x = x + self.dropout(self.proj(attended.transpose(1, 2).reshape(batch, length, dim)))
        out: Tensor = x + self.dropout(self.down(gelu(self.up(self.norm2(x)))))
        return out


class Encoder(nn.Module):
    """tokens (batch, length) -> logits (batch, labels)."""

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (batch, length <= max_length), padded with 0 at the end to logits (batch, labels)."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        # The first token is always seen: a softmax over an empty text would be NaN.
        seen = (tokens != PAD) | (place == 0)
        x = self.dropout(self.embedding(tokens) + self.position(place))
        for block in self.blocks:
            x = block(x, seen[:, None, None, :])
        weight = seen.unsqueeze(2).to(x.dtype)
        pooled = (self.norm(x) * weight).sum(dim=1) / weight.sum(dim=1)
        logits: Tensor = self.output(pooled)
        return logits


def build(config: Config, spec: Spec) -> nn.Module:
    """A model for `spec.vocab_size` tokens, texts of up to `spec.max_length` tokens and `spec.num_labels` labels."""
    return Encoder(config, spec)
