"""Scratch folders: what outlives a killed stage, held by one run at a time.

A run holds its folder by a lock on a file in it, which the system releases when the process dies: nothing is left that
the next run would have to judge.
"""

from __future__ import annotations

import errno
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
from trainer.parallel import nodes

# How long to wait for a run that is just ending.
PATIENCE_S = 5.0
# In a job of a cluster no other process is at work, but a file server may keep the lock of a machine that was lost.
JOB_PATIENCE_S = 120.0
# Of all pods that millrace asks for, and of those that torchrun's operators make.
_OF_JOBS = (nodes.NODES, "PET_NNODES")
# Killed runs with other parameters may still be taken up again; not after so long.
STALE_S = 7 * 24 * 3600.0
_LOCK = "lock"
# What file systems without locks say, and NFS for some of them.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


@contextmanager
def held(name: str, fingerprint: str, output: str, place: str = "") -> Iterator[Path]:
    """The scratch folder of a run, which no other process enters meanwhile.

    After success it is removed, with what killed runs of the same stage left beside it a week ago or earlier. After a
    failure it stays, unless nothing is in it.

    Args:
        name: of the stage.
        fingerprint: of all that determines the stage's result.
        output: URI of the stage's first output; beside it, in `.scratch`, is where scratch is kept by default.
        place: another folder to keep it in; only this run's own scratch is removed there.

    Raises:
        StorageError: another process runs the same stage on the same inputs with the same parameters.
    """
    folder = folder_of(name, fingerprint, output, place)
    root = folder.parent
    was_there = root.exists()
    with storage.explained(folder):
        descriptor = _wait_for_lock(folder, _patience())
    if descriptor is None:
        message = f"{folder}: another process runs this stage with the same parameters"
        raise StorageError(message, "wait for it, or end it; or give this run another --scratch=FOLDER")
    try:
        yield folder
        if _is(descriptor, folder):
            _discard(folder)
        if not place:
            _sweep(root, name)
    finally:
        if _is(descriptor, folder) and list(folder.iterdir()) == [folder / _LOCK]:
            _discard(folder)
        os.close(descriptor)
        if not (place and was_there):
            with suppress(OSError):
                root.rmdir()  # if nothing else is in it


def folder_of(name: str, fingerprint: str, output: str, place: str = "") -> Path:
    """Where the scratch folder of a run is; arguments as for `held`."""
    root = storage.local_path(place) if place else _beside(output)
    return root / f"{name}-{fingerprint}"


def _patience() -> float:
    return JOB_PATIENCE_S if any(name in os.environ for name in _OF_JOBS) else PATIENCE_S


def _wait_for_lock(folder: Path, patience: float) -> int | None:
    """Make the folder and lock it; the descriptor that holds it, or None if another process has it for so long."""
    until = time.monotonic() + patience
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, others = _try_lock(folder, os.O_RDWR | os.O_CREAT)
        if descriptor is not None:
            return descriptor
        if others and time.monotonic() >= until:
            return None
        time.sleep(0.05)


def _try_lock(folder: Path, flags: int) -> tuple[int | None, bool]:
    """(descriptor that holds the folder, or None; whether another process has it)."""
    try:
        descriptor = os.open(folder / _LOCK, flags, 0o600)
    except FileNotFoundError:
        return None, False  # whoever held it has removed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None, True
    except OSError as error:
        # Without locks a run goes on as if it were alone, but no other's folder is touched.
        if error.errno in _NO_LOCKS and flags & os.O_CREAT:
            return descriptor, False
        os.close(descriptor)
        return None, True
    if _is(descriptor, folder):
        return descriptor, False
    os.close(descriptor)
    return None, False


def _is(descriptor: int, folder: Path) -> bool:
    """Whether the folder's lock is the one that was opened: it may have been removed since, and be another's now."""
    try:
        return os.path.samestat(os.fstat(descriptor), (folder / _LOCK).stat())
    except FileNotFoundError:
        return False


def _discard(folder: Path) -> None:
    """Remove a folder that is held, its lock last: who locks a new one in its place finds nothing of this one."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            storage.remove(path)
    (folder / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _sweep(root: Path, name: str) -> None:
    """Remove what killed runs of a stage have left long ago, but nothing that a process holds or that is not ours."""
    for folder in root.glob(f"{name}-{'[0-9a-f]' * 12}"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < STALE_S:
                continue
            descriptor, _ = _try_lock(folder, os.O_RDWR)
            if descriptor is not None:
                _discard(folder)
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
