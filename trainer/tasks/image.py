"""Classification of pictures, with small random shifts in training; a unit is a picture."""

from __future__ import annotations

import numpy as np
import torch

from trainer.tasks.base import Batch
from trainer.tasks.classify import LabelTask


class ImageClassify(LabelTask):
    """Pictures to labels. Inputs are float32 (rows, channels, size, size) in 0..1; targets int64 (rows)."""

    name = "image"

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """Pictures at `index`."""
        data = self.split(split)
        images = torch.from_numpy(np.asarray(data.images[index], np.float32) / 255.0)
        return {"inputs": images, "targets": torch.from_numpy(data.labels[index].astype(np.int64))}

    def augment(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Shift each picture by up to a sixteenth of its side in both directions, filling with zeros.

        Pictures below 16 pixels stay as they are: a whole pixel is much of them (on the 8 x 8 digits, shifting costs
        0.8 points of accuracy).
        """
        images = batch["inputs"]
        reach = images.shape[-1] // 16
        if reach == 0:
            return batch
        size = images.shape[-1]
        padded = torch.nn.functional.pad(images, (reach, reach, reach, reach))
        shift = rng.integers(0, 2 * reach + 1, (2, len(images)))
        place = np.arange(size)
        rows = torch.from_numpy(shift[0][:, None] + place)
        columns = torch.from_numpy(shift[1][:, None] + place)
        picture = torch.arange(len(images))[:, None, None]
        shifted = padded.movedim(1, -1)[picture, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
        return {**batch, "inputs": shifted}
