"""The data version: the md5 that DVC gives a file or a folder, so that a dataset names the raw data it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


def file_md5(path: Path) -> str:
    """Hex md5 of a file's bytes, as in its .dvc file."""
    with open(path, "rb") as file:
        return stream_md5(file)


def stream_md5(file: BinaryIO) -> str:
    """Hex md5 of what is left in an open file."""
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def listing_md5(entries: Iterable[tuple[str, str]]) -> str:
    """DVC's md5 of a folder: that of the JSON list of its files, with `.dir` at the end.

    Args:
        entries: (relative path with forward slashes, md5) of each file.
    """
    listing = [{"md5": md5, "relpath": name} for name, md5 in sorted(entries)]
    content = json.dumps(listing, sort_keys=True).encode()
    return hashlib.md5(content, usedforsecurity=False).hexdigest() + ".dir"


def data_version(path: Path) -> str:
    """DVC's md5 of a file or of a folder with all its files."""
    if path.is_file():
        return file_md5(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return listing_md5((each.relative_to(path).as_posix(), file_md5(each)) for each in files)
