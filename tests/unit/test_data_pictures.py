"""Pictures: pixel values and files come out as arrays of one shape, anything else says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.examples import Bad
from trainer.data.pictures import decode

GREY = [[0, 255], [128, 7]]
COLOUR = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def pixels(picture: Any, size: int, channels: int, folder: Path = Path()) -> np.ndarray:
    found = decode(picture, folder, size, channels)
    assert isinstance(found, bytes), found
    return np.frombuffer(found, np.uint8).reshape(channels, size, size)


def test_pixel_values_of_the_right_size_stay_as_they_are() -> None:
    assert pixels(GREY, 2, 1).tolist() == [GREY]
    assert pixels(COLOUR, 2, 3).transpose(1, 2, 0).tolist() == COLOUR


def test_channels_are_converted() -> None:
    assert pixels(GREY, 2, 3).tolist() == [GREY] * 3
    assert pixels(COLOUR, 2, 1).shape == (1, 2, 2)


def test_grey_pictures_need_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    assert pixels(GREY, 2, 1).tolist() == [GREY]


@pytest.mark.parametrize("form", ["png", "bmp", "gif"])
def test_files_of_any_size_are_scaled(form: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((13, 7), 90, np.uint8)).save(tmp_path / f"a.{form}")
    assert np.unique(pixels(f"a.{form}", 8, 1, tmp_path)).tolist() == [90]


WRONG: dict[str, Any] = {
    "number": 3, "null": None, "text of no file": "none.png", "absolute path": "/etc/hostname", "way out": "../a.png",
    "ragged rows": [[1, 2], [3]], "fractions": [[0.5]], "negative": [[-1]], "too large": [[256]], "nothing": [],
    "huge": [[10**30]], "words": [["a"]], "four channels": [[[1, 2, 3, 4]]], "object": {"a": 1}, "zero byte": "a\0b",
    "folder": ".",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_says_so(name: str, tmp_path: Path) -> None:
    found = decode(WRONG[name], tmp_path, 8, 1)
    assert isinstance(found, Bad)
    assert found.kind == "no_picture"
