"""Atomic publishing: an artifact is built in a temporary folder beside its target and renamed when it is complete."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer import storage


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, moved there when the block ends well and removed when it does not.

    Readers, and whoever comes after a crash, see the old artifact, nothing, or the complete new one.
    """
    with storage.explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        storage.remove(temporary)
        temporary.mkdir()
    try:
        yield temporary
        with storage.explained(target):
            _replace(temporary, target)
    finally:
        storage.remove(temporary)


def _replace(temporary: Path, target: Path) -> None:
    old = temporary.with_suffix(".old.tmp")
    if target.exists():
        # A folder cannot be renamed over another: for a moment nothing is there, which is one of the promised states.
        target.rename(old)
    temporary.rename(target)
    storage.sync_folder(target.parent)
    storage.remove(old)


def sweep(target: Path) -> None:
    """Remove what processes of this machine that are no longer alive left beside `target`."""
    host = socket.gethostname()
    for path in target.parent.glob(f".{target.name}.{host}.*.tmp"):
        pid = path.name.removeprefix(f".{target.name}.{host}.").split(".")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            storage.remove(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
