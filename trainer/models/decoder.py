"""Decoder language model in the shape of Llama (Touvron et al. 2023).

Rotary positions (Su et al. 2021), RMSNorm before each branch (Zhang and Sennrich 2019), grouped-query attention
(Ainslie et al. 2023), SwiGLU (Shazeer 2020), and the token embedding as output layer (Press and Wolf 2017). Optional:
RMSNorm on queries and keys (Henry et al. 2020), and embeddings of hashed pairs of tokens beside those of tokens, as in
Jordan et al.'s modded-nanogpt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from trainer.artifacts.dataset import PAD, Spec
from trainer.config.model import Decoder as Config
from trainer.models.ops import causal_attention, rms_norm, rotate
from trainer.models.stack import Stack

# Of the hash of a pair of tokens: products of two token ids stay far below 2^63.
MIX_PREVIOUS, MIX_TOKEN, PRIME = 36313, 27191, 2_147_483_647


def rotary(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, width / 2) of the rotary angles."""
    frequency = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency[None, :]
    return angle.cos(), angle.sin()


class RMSNorm(nn.RMSNorm):
    """torch's, faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the same shape."""
        return rms_norm(x, self.weight, self.eps or 0.0)


class Block(nn.Module):
    """Causal grouped-query attention and SwiGLU, each a residual branch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.width = config.dim // config.heads
        self.norm1 = RMSNorm(config.dim, eps=1e-6)
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * self.width, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * self.width, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.query_norm = RMSNorm(self.width, eps=1e-6) if config.qk_norm else None
        self.key_norm = RMSNorm(self.width, eps=1e-6) if config.qk_norm else None
        self.norm2 = RMSNorm(config.dim, eps=1e-6)
        self.gate = nn.Linear(config.dim, config.ff, bias=False)
        self.up = nn.Linear(config.dim, config.ff, bias=False)
        self.down = nn.Linear(config.ff, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.dropout(self.attend(self.norm1(x), cos, sin))
        normed = self.norm2(x)
        out: Tensor = x + self.dropout(self.down(silu(self.gate(normed)) * self.up(normed)))
        return out

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal self-attention."""
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        key = self.key(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        value = self.value(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        attended = self.mix(rotate(query, cos, sin), rotate(key, cos, sin), value)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of queries (batch, heads, length, width) to keys and values (batch, kv_heads, length, width)."""
        return causal_attention(query, *self.spread(key, value))

    def spread(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A key and a value head for each query head: one serves heads / kv_heads of them."""
        group = self.heads // self.kv_heads
        if group == 1:
            return key, value
        return key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)


class Decoder(Stack):
    """tokens (batch, length) -> logits of the next token (batch, length, vocabulary)."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.theta = config.rope_theta
        self.dim, self.width = config.dim, config.dim // config.heads
        self.embedding = nn.Embedding(vocab_size, config.dim)
        # Row 0 is of no pair: it is zero and has no gradient.
        self.bigrams = nn.Embedding(config.bigrams, config.dim, padding_idx=0) if config.bigrams else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=1e-6)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)
        self.embed_names = ("embedding", "bigrams") if config.bigrams else ("embedding",)
        self.head_names = ("norm", "embedding" if config.tie_embeddings else "output")
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Residual branches shrink with the depth, so that the stream's variance does not grow (GPT-2).
                deep = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if deep else 0.02)
        if self.bigrams is not None:
            nn.init.zeros_(self.bigrams.weight)

    def embed(self, inputs: Tensor) -> Tensor:
        """Tokens int64 (batch, length) as vectors (batch, length, dim)."""
        x: Tensor = self.embedding(inputs)
        if self.bigrams is not None:
            x = x + self.bigrams(pairs(inputs, self.before(inputs), self.bigrams.num_embeddings))
        embedded: Tensor = self.dropout(x)
        return embedded

    def before(self, inputs: Tensor) -> Tensor:
        """The token before each."""
        return previous(inputs)

    def beside(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Cosine and sine of the rotary angles."""
        return rotary(inputs.shape[1], self.width, self.theta, inputs.device)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary); place t predicts token t + 1."""
        x = self.norm(x)
        logits: Tensor = linear(x, self.embedding.weight) if self.output is None else self.output(x)
        return logits

    def ends(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The normed stream and the matrix of the head; logits and None where that is divided among ranks."""
        weight = self.embedding.weight if self.output is None else self.output.weight
        if type(self.output) not in (type(None), nn.Linear) or hasattr(weight, "placements"):
            return self.head(x, inputs), None
        return self.norm(x), weight

    def stream(self, inputs: Tensor) -> tuple[int, ...]:
        """(batch, length, dim)."""
        return (*inputs.shape, self.dim)


def previous(tokens: Tensor) -> Tensor:
    """The token before each, int64 (batch, length); padding before the first."""
    return pad(tokens[:, :-1], (1, 0), value=PAD)


def pairs(tokens: Tensor, before: Tensor, rows: int) -> Tensor:
    """Row, int64 (batch, length), of each token and the one before it; 0 where one of the two is missing or padding."""
    hashed = 1 + (before * MIX_PREVIOUS + tokens * MIX_TOKEN) % PRIME % (rows - 1)
    return torch.where((before != PAD) & (tokens != PAD), hashed, torch.zeros_like(hashed))


def build(config: Config, spec: Spec) -> nn.Module:
    """A model for `spec.vocab_size` tokens; its length is bounded by memory only."""
    return Decoder(config, spec.vocab_size)
