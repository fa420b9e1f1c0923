"""Vision transformer (Dosovitskiy et al. 2021): patches are tokens, the mean of their outputs is classified."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import Spec
from trainer.config.model import ViT as Config
from trainer.errors import ConfigError
from trainer.models.encoder import Block
from trainer.models.stack import Stack


class ViT(Stack):
    """images float32 (batch, channels, height, width) in 0..1 -> logits (batch, labels)."""

    embed_names = ("patches", "position")
    head_names = ("norm", "output")

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.patches = nn.Conv2d(spec.image_channels, config.dim, config.patch, stride=config.patch)
        self.sizes = ((spec.image_size // config.patch) ** 2, config.dim)
        self.position = nn.Parameter(torch.zeros(1, *self.sizes))
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.ff, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, spec.num_labels)

    def embed(self, inputs: Tensor) -> Tensor:
        """Patches and their places as vectors (batch, patches, dim)."""
        patches = self.patches(inputs * 2 - 1).flatten(2).transpose(1, 2)
        embedded: Tensor = self.dropout(patches + self.position)
        return embedded

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Logits (batch, labels) of the mean over a picture's patches."""
        logits: Tensor = self.output(self.norm(x).mean(dim=1))
        return logits

    def stream(self, inputs: Tensor) -> tuple[int, ...]:
        """(batch, patches, dim)."""
        return (len(inputs), *self.sizes)


def build(config: Config, spec: Spec) -> nn.Module:
    """A model for square pictures of `spec.image_size` pixels a side.

    Raises:
        ConfigError: the patch does not divide the picture.
    """
    if spec.image_size % config.patch:
        raise ConfigError(
            f"model.patch: {config.patch} does not divide data.image_size, {spec.image_size}",
            f"use a patch that divides {spec.image_size}",
        )
    return ViT(config, spec)
