"""Small residual convolutional network for pictures (He et al. 2016), with group norm and average pooling.

Group norm (Wu and He 2018) in place of batch norm: each picture is normalised by itself, so that a step's gradient does
not depend on how it is divided into micro-batches and ranks, and training and inference compute the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import Spec
from trainer.config import model as families


def _norm(channels: int) -> nn.GroupNorm:
    # 4 groups, or fewer where they would not be equal.
    return nn.GroupNorm(math.gcd(4, channels), channels)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), _norm(outputs))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; `stride` 2 halves the picture."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class CNN(nn.Module):
    """images (batch, channels, height, width) in 0..1 -> logits (batch, labels)."""

    def __init__(self, config: families.CNN, spec: Spec) -> None:
        super().__init__()
        width = config.width
        self.stem = _conv(spec.image_channels, width)
        blocks: list[nn.Module] = []
        for _ in range(config.stages):
            blocks += [Block(width, width, 1), Block(width, 2 * width, 2)]
            width *= 2
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(width, spec.num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images float32 (batch, channels, height, width) in 0..1 to logits (batch, labels)."""
        # Channels last: convolutions are nearly twice as fast on CPUs.
        x = self.stem(images * 2 - 1).contiguous(memory_format=torch.channels_last)
        features = self.blocks(torch.relu(x)).mean(dim=(2, 3))
        logits: Tensor = self.output(self.dropout(features))
        return logits


def build(config: families.CNN, spec: Spec) -> nn.Module:
    """A model for `spec.image_channels` channels and `spec.num_labels` labels."""
    return CNN(config, spec)
