"""Scratch folders: what outlives a killed stage, held by one run at a time.

A run holds its folder by a lock on the folder itself, which the system releases when the process dies: nothing is left
that the next run would have to judge.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer import storage
from trainer.errors import StorageError

# A killed run's own processes end within moments; until then they may hold its lock.
PATIENCE_S = 5.0


@contextmanager
def held(name: str, fingerprint: str, output: str, place: str = "") -> Iterator[Path]:
    """The scratch folder of a run, which no other process enters meanwhile.

    After success it is removed, with what killed runs of the same stage with other parameters have left beside it. After
    a failure it stays, unless nothing is in it.

    Args:
        name: of the stage.
        fingerprint: of all that determines the stage's result.
        output: URI of the stage's first output; beside it, in `.scratch`, is where scratch is kept by default.
        place: another folder to keep it in; only this run's own scratch is removed there.

    Raises:
        StorageError: another process runs the same stage on the same inputs with the same parameters.
    """
    root = storage.local_path(place) if place else _beside(output)
    folder = root / f"{name}-{fingerprint}"
    with storage.explained(folder):
        descriptor = _lock(folder, PATIENCE_S)
    if descriptor is None:
        message = f"{folder}: another process runs this stage with the same parameters"
        raise StorageError(message, "wait for it, or end it; or give this run another --scratch=FOLDER")
    try:
        yield folder
        storage.remove(folder)
        if not place:
            _sweep(root, name)
    finally:
        for empty in (folder, root):
            with suppress(OSError):
                empty.rmdir()
        os.close(descriptor)


def _lock(folder: Path, patience: float) -> int | None:
    """Make the folder and lock it; the descriptor that holds it, or None if another process has it for so long."""
    until = time.monotonic() + patience
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _try_lock(folder)
        if descriptor is not None:
            return descriptor
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)


def _try_lock(folder: Path) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None  # whoever held it has removed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What is locked may have been removed in that moment, and another be in its place.
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        return descriptor  # a file system without locks
    os.close(descriptor)
    return None


def _sweep(root: Path, name: str) -> None:
    """Remove what killed runs of a stage have left, but nothing that a process holds."""
    for folder in root.glob(f"{name}-*"):
        descriptor = _try_lock(folder)
        if descriptor is not None:
            storage.remove(folder)
            os.close(descriptor)


def _beside(uri: str) -> Path:
    if storage.is_remote(uri):
        return _private(Path(tempfile.gettempdir()) / f"millrace-scratch-{os.getuid()}")
    return storage.local_path(uri).absolute().parent / ".scratch"


def _private(place: Path) -> Path:
    """Make a folder that nobody else can enter: its name is known to all, and what it holds is resumed from.

    Raises:
        StorageError: it belongs to somebody else, is a link, or others can write to it.
    """
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        message = f"{place}: is no folder that belongs to this user alone"
        raise StorageError(message, "remove it, or give --scratch=FOLDER")
    return place
