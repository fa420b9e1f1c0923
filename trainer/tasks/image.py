"""Classification of pictures, slightly turned, scaled and shifted in training; a unit is a picture."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from trainer.tasks.base import Batch
from trainer.tasks.classify import LabelTask

# Largest turn in radians, largest change of scale (as a logarithm), largest shift as a share of half the side.
TURN, SCALE, SHIFT = 0.12, 0.08, 0.08


class ImageClassify(LabelTask):
    """Pictures to labels. Inputs are float32 (rows, channels, size, size) in 0..1; targets int64 (rows)."""

    name = "image"

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """Pictures at `index`."""
        data = self.split(split)
        images = torch.from_numpy(np.asarray(data.images[index], np.float32) / 255.0)
        return {"inputs": images, "targets": torch.from_numpy(data.labels[index].astype(np.int64))}

    def augment(self, batch: Batch, rng: np.random.Generator, first: int = 0) -> Batch:
        """Turn, scale and shift each picture a little, with bilinear interpolation, filling with zeros.

        Shifts are fractions of a pixel for small pictures: on the 8 x 8 digits, whole pixels cost 0.8 points of accuracy.
        """
        images = batch["inputs"]
        drawn = rng.uniform(-1, 1, (first + len(images), 4))[first:].T
        angle, scale, right, down = drawn * np.array([[TURN], [SCALE], [SHIFT], [SHIFT]])
        grow = np.exp(scale)
        cosine, sine = grow * np.cos(angle), grow * np.sin(angle)
        matrices = np.stack([np.stack([cosine, -sine, right], 1), np.stack([sine, cosine, down], 1)], 1)
        grid = affine_grid(torch.from_numpy(matrices.astype(np.float32)), list(images.shape), align_corners=False)
        return {**batch, "inputs": grid_sample(images, grid, mode="bilinear", align_corners=False)}
