"""Pictures as uint8 arrays: decoded with Pillow, or given as rows of pixel values; all scaled to one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.examples import Bad
from trainer.errors import DataError


def decode(picture: Any, folder: Path, size: int, channels: int) -> bytes | Bad:
    """The bytes of a (channels, size, size) uint8 array, or the reason why there is no picture.

    Args:
        picture: a file name below `folder`, or rows of pixel values in 0..255 (grey, or three values each).
        folder: where files are.
        size: pixels on each side.
        channels: 1 or 3.

    Raises:
        DataError: Pillow is needed and not installed.
    """
    if isinstance(picture, str):
        return _from_file(picture, folder, size, channels)
    try:
        values = np.array(picture)
    except (ValueError, OverflowError):
        return Bad("no_picture", "holds rows of pixel values that differ in length")
    fits = values.dtype.kind in "iu" and values.size and (values.ndim == 2 or values.shape[2:] == (3,))
    if not fits or values.min() < 0 or values.max() > 255:
        return Bad("no_picture", "holds no rows of pixel values in 0..255")
    pixels = values.astype(np.uint8)
    if pixels.shape == (size, size) and channels == 1:
        return pixels.tobytes()  # as it is: Pillow is not needed
    return _scaled(_pillow().fromarray(pixels), size, channels)


def _from_file(name: str, folder: Path, size: int, channels: int) -> bytes | Bad:
    image_module = _pillow()
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return Bad("no_picture", "names a file outside the folder")
        with image_module.open(path) as image:
            return _scaled(image, size, channels)
    except FileNotFoundError:
        return Bad("no_picture", "names a file that is not there")
    except (OSError, ValueError, TypeError, SyntaxError, image_module.DecompressionBombError) as error:
        return Bad("no_picture", f"holds no picture ({type(error).__name__})")


def _scaled(image: Any, size: int, channels: int) -> bytes:
    pixels = image.convert("L" if channels == 1 else "RGB")
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), _pillow().Resampling.BILINEAR)
    array = np.asarray(pixels, np.uint8).reshape(size, size, channels)
    return np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("pictures cannot be decoded: Pillow is not installed", "pip install pillow") from None
    return Image
