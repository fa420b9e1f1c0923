"""Section `model`: one class per model family; `model.name` chooses. `FAMILIES`, at the end, is the registry.

To add a family, write `trainer/models/NAME.py` with a `build(config, spec)` and enter its class of parameters in
`FAMILIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, Union

from pydantic import Field, model_validator

from trainer.config.base import Section

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class Family(Section):
    """Parameters of a model family; `name` is the family's."""

    name: str


class NgramBag(Family):
    """Hashed n-gram bag: embeddings of hashed token n-grams, pooled, then a small network (Joulin et al. 2017)."""

    name: Literal["ngram"] = "ngram"
    buckets: int = Field(default=32768, ge=16)
    """Rows of the hashed embedding table."""
    dim: int = Field(default=48, ge=1)
    """Width of an embedding."""
    orders: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(default=(1, 2, 3), min_length=1)
    """Lengths of the n-grams."""
    hidden: int = Field(default=0, ge=0)
    """Width of the hidden layer; 0 has none."""
    dropout: Dropout = 0.2
    """Dropout on the pooled vector."""
    ngram_dropout: Dropout = 0.0
    """Share of the n-grams left out of each training text."""
    combiner: Literal["mean", "sqrtn"] = "mean"
    """The sum of the n-grams' embeddings is divided by their number (mean) or by its square root (sqrtn)."""


class TextCNN(Family):
    """Convolutions over token embeddings with max pooling (Kim 2014)."""

    name: Literal["textcnn"] = "textcnn"
    dim: int = Field(default=128, ge=1)
    """Width of a token embedding."""
    filters: int = Field(default=100, ge=1)
    """Number of filters of each size."""
    sizes: tuple[Annotated[int, Field(ge=1, le=31)], ...] = Field(default=(3, 4, 5), min_length=1)
    """Filter widths in tokens."""
    dropout: Dropout = 0.5
    """Dropout before the classifier."""


class Encoder(Family):
    """Transformer encoder with mean pooling (Vaswani et al. 2017, pre-norm)."""

    name: Literal["encoder"] = "encoder"
    dim: int = Field(default=128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(default=2, ge=1)
    """Number of blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; must divide dim."""
    ff: int = Field(default=512, ge=1)
    """Width of the feed-forward layer."""
    dropout: Dropout = 0.1
    """Dropout on embeddings, attention and feed-forward."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        return self


class Decoder(Family):
    """Decoder language model: RoPE, RMSNorm, grouped-query attention, SwiGLU (Touvron et al. 2023)."""

    name: Literal["decoder"] = "decoder"
    dim: int = Field(default=192, ge=8)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Number of blocks."""
    heads: int = Field(default=6, ge=1)
    """Query heads; must divide dim into heads of an even width."""
    kv_heads: int = Field(default=2, ge=1)
    """Key and value heads; must divide heads."""
    ff: int = Field(default=512, ge=1)
    """Width of the SwiGLU layer."""
    dropout: Dropout = 0.0
    """Dropout on embeddings and residual branches."""
    rope_theta: float = Field(default=10000.0, gt=0.0)
    """Base of the rotary position frequencies."""
    tie_embeddings: bool = True
    """Use one matrix for the token embedding and the output layer."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head, which keeps attention stable at high rates (Henry et al. 2020)."""
    bigrams: int = Field(default=0, ge=0)
    """Rows of a hashed table of pairs of tokens, added to the token embedding; 0 has none."""

    @model_validator(mode="after")
    def _rows_for_pairs(self) -> Self:
        if self.bigrams == 1:
            raise ValueError("bigrams (1) leaves no row for pairs, since row 0 is for none: use 0, or 2 and more")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim ({self.dim}) must be a multiple of 2 x heads ({2 * self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        return self


class CNN(Family):
    """Small residual convolutional network for pictures (He et al. 2016)."""

    name: Literal["cnn"] = "cnn"
    width: int = Field(default=32, ge=1)
    """Channels of the first stage; each later stage doubles them."""
    stages: int = Field(default=2, ge=1, le=5)
    """Number of stages; each halves the picture."""
    dropout: Dropout = 0.2
    """Dropout before the classifier."""


class ViT(Family):
    """Vision transformer (Dosovitskiy et al. 2021)."""

    name: Literal["vit"] = "vit"
    patch: int = Field(default=2, ge=1)
    """Pixels on each side of a patch; must divide data.image_size."""
    dim: int = Field(default=64, ge=8)
    """Width of the residual stream."""
    layers: int = Field(default=3, ge=1)
    """Number of blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; must divide dim."""
    ff: int = Field(default=128, ge=1)
    """Width of the feed-forward layer."""
    dropout: Dropout = 0.1
    """Dropout on embeddings, attention and feed-forward."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        return self


# name -> (parameters, module with build(config, spec), tasks it can learn)
FAMILIES: dict[str, tuple[type[Family], str, tuple[str, ...]]] = {
    "ngram": (NgramBag, "trainer.models.ngram", ("classify",)),
    "textcnn": (TextCNN, "trainer.models.textcnn", ("classify",)),
    "encoder": (Encoder, "trainer.models.encoder", ("classify",)),
    "decoder": (Decoder, "trainer.models.decoder", ("lm",)),
    "cnn": (CNN, "trainer.models.cnn", ("image",)),
    "vit": (ViT, "trainer.models.vit", ("image",)),
}

if TYPE_CHECKING:
    Model = Family
else:
    Model = Annotated[Union[tuple(family for family, _, _ in FAMILIES.values())], Field(discriminator="name")]  # noqa: UP007
