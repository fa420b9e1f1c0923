"""The shape of a decoder language model: its matrices, parameters and floating-point operations, without building it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from trainer.config import Params
from trainer.config.model import Decoder
from trainer.errors import ConfigError

Matrix = tuple[int, ...]
"""Shape of a parameter: (rows, columns), or (values,) for a gain."""


@dataclass(frozen=True)
class Shape:
    """A decoder of `trainer.models.decoder`; `length` is the number of tokens of a sequence."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ff: int
    vocab: int
    length: int
    tied: bool
    dropout: float = 0.0
    qk_norm: bool = False
    bigrams: int = 0

    @property
    def kv(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.dim // self.heads * self.kv_heads

    def block(self) -> dict[str, Matrix]:
        """Parameters of one block, by name."""
        d, kv, ff = self.dim, self.kv, self.ff
        width = d // self.heads
        norms: dict[str, Matrix] = {"query_norm": (width,), "key_norm": (width,)} if self.qk_norm else {}
        return {
            **norms, "norm1": (d,), "query": (d, d), "key": (kv, d), "value": (kv, d), "proj": (d, d),
            "norm2": (d,), "gate": (ff, d), "up": (ff, d), "down": (d, ff),
        }  # fmt: skip

    def ends(self) -> dict[str, Matrix]:
        """Parameters before and after the blocks."""
        found: dict[str, Matrix] = {"embedding": (self.vocab, self.dim)}
        if self.bigrams:
            found["bigrams"] = (self.bigrams, self.dim)
        found["norm"] = (self.dim,)
        return found if self.tied else {**found, "output": (self.vocab, self.dim)}

    def parameters(self) -> Iterator[tuple[str, Matrix, int]]:
        """Name, shape and number of times of every parameter."""
        for name, shape in self.block().items():
            yield name, shape, self.layers
        for name, shape in self.ends().items():
            yield name, shape, 1

    @cached_property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        return sum(math.prod(shape) for shape in self.block().values())

    @cached_property
    def num_parameters(self) -> int:
        """All parameters; a tied output layer counts once."""
        return sum(math.prod(shape) * times for _, shape, times in self.parameters())

    @cached_property
    def block_flops(self) -> float:
        """Multiplications and additions of a block's matrices for one token, forward."""
        return 2.0 * sum(math.prod(shape) for shape in self.block().values() if len(shape) > 1)

    @property
    def attention_flops(self) -> float:
        """Those of a block's two products of attention for one token, forward, as if every token saw all others."""
        return 4.0 * self.length * self.dim

    @property
    def head_flops(self) -> float:
        """Those of the output layer for one token, forward."""
        return 2.0 * self.vocab * self.dim

    @property
    def flops_per_token(self) -> float:
        """Arithmetic of training on a token, as MFU counts it: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B)."""
        return 3.0 * (self.layers * (self.block_flops + self.attention_flops) + self.head_flops)


def shape_of(params: Params) -> Shape:
    """The shape that sections `model` and `data` mean.

    Raises:
        ConfigError: it is no decoder.
    """
    model = params.model
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"model.name: {model.name}, but only language models of family decoder are large enough to plan for",
            "`millrace plan --preset llama-8b` is an example; any other model trains on one GPU or on a CPU",
        )
    return Shape(
        model.dim, model.layers, model.heads, model.kv_heads, model.ff, params.data.tokenizer.vocab_size,
        params.data.max_length, model.tie_embeddings, model.dropout, model.qk_norm, model.bigrams,
    )  # fmt: skip
