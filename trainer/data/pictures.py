"""Pictures as uint8 arrays: decoded with Pillow, or given as lists of pixel values; all scaled to one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.examples import Bad


def decode(picture: Any, folder: Path, size: int, channels: int) -> bytes | Bad:
    """The bytes of a (channels, size, size) uint8 array, or the reason why there is no picture.

    Args:
        picture: a file name below `folder`, or rows of pixel values in 0..255 (grey, or three values each).
        folder: where files are.
        size: pixels on each side.
        channels: 1 or 3.
    """
    from PIL import Image, UnidentifiedImageError

    mode = "L" if channels == 1 else "RGB"
    try:
        if isinstance(picture, str):
            path = (folder / picture).resolve()
            if not path.is_relative_to(folder.resolve()):
                return Bad("no_picture", "names a file outside the folder")
            with Image.open(path) as image:
                pixels = image.convert(mode)
        else:
            values = np.array(picture)
            if values.dtype.kind not in "iu" or values.ndim not in (2, 3) or values.min() < 0 or values.max() > 255:
                return Bad("no_picture", "holds no rows of pixel values in 0..255")
            pixels = Image.fromarray(values.astype(np.uint8)).convert(mode)
    except FileNotFoundError:
        return Bad("no_picture", "names a file that is not there")
    except (UnidentifiedImageError, OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        return Bad("no_picture", f"holds no picture ({type(error).__name__})")
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(pixels, np.uint8).reshape(size, size, channels)
    return np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()
