"""Vision transformer (Dosovitskiy et al. 2021): patches are tokens, the mean of their outputs is classified."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import Spec
from trainer.config.model import ViT as Config
from trainer.errors import ConfigError
from trainer.models.encoder import Block


class ViT(nn.Module):
    """images (batch, channels, height, width) in 0..1 -> logits (batch, labels)."""

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.patches = nn.Conv2d(spec.image_channels, config.dim, config.patch, stride=config.patch)
        self.position = nn.Parameter(torch.zeros(1, (spec.image_size // config.patch) ** 2, config.dim))
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.ff, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, spec.num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images float32 (batch, channels, height, width) in 0..1 to logits (batch, labels)."""
        patches = self.patches(images * 2 - 1).flatten(2).transpose(1, 2)
        x = self.dropout(patches + self.position)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x).mean(dim=1))
        return logits


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
