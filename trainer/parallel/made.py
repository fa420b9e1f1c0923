"""What the ranks of several nodes have made, in the scratch folder that all nodes share, until the first has published it.

The other nodes are done and gone by then. Should the first be lost while it publishes, it has nothing to train when it is
back, and nobody to wait for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from trainer import storage

FOLDER = "made"
_RESULT, _OUTPUTS = "result.json", "outputs"


def keep(scratch: Path, outputs: Mapping[str, Path], result: bytes) -> None:
    """Keep all files of the outputs, and the result as JSON."""
    aside = scratch / f".tmp-{FOLDER}"
    storage.remove(aside)
    for name, folder in outputs.items():
        shutil.copytree(folder, aside / _OUTPUTS / name, copy_function=_copy)
    storage.write_atomic(aside / _RESULT, result)
    aside.rename(scratch / FOLDER)
    storage.sync_folder(scratch)


def is_kept(scratch: Path) -> bool:
    """Whether ranks have made all that they have to."""
    return (scratch / FOLDER / _RESULT).is_file()


def take(scratch: Path, outputs: Mapping[str, Path]) -> bytes:
    """Put the files into the folders of the outputs; returns the result as JSON."""
    for name, folder in outputs.items():
        shutil.copytree(scratch / FOLDER / _OUTPUTS / name, folder, copy_function=_copy, dirs_exist_ok=True)
    return (scratch / FOLDER / _RESULT).read_bytes()


def _copy(source: str, target: str) -> None:
    """A second name for the file where the file system gives one, else a durable copy."""
    Path(target).unlink(missing_ok=True)  # of a rank that was ended; it may be the same file
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())
