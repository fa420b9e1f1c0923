"""Atomic publishing: an artifact is built in a temporary folder beside its target and renamed when it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer import storage
from trainer.errors import StorageError


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, moved there when the block ends well and removed when it does not.

    Readers, and whoever comes after a crash, see the old artifact, nothing, or the complete new one. Of two that build
    the same target at once, the last one to finish wins. What is not an artifact is never replaced.

    Raises:
        StorageError: the target is a file or holds other files, or the file system is full or cannot be written.
    """
    with storage.explained(target):
        # Through a link to where the data really is: the rename must stay on one file system.
        target = target.resolve()
        check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        temporary, lock = _make_locked(target)
    try:
        yield temporary
        with storage.explained(target):
            check_replaceable(target)
            _replace(temporary, target)
    finally:
        storage.remove(temporary)
        os.close(lock)


def check_replaceable(target: Path) -> None:
    """Raise a StorageError unless the target is free, an empty folder or an artifact."""
    if not target.name:
        raise StorageError(f"{target}: not a folder to write an artifact to", "choose a folder inside")
    while True:
        try:
            folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise StorageError(
                f"{target}: is a file, a folder is to be written", "choose another path, or remove it"
            ) from None
        try:
            # Through the descriptor, and only believed if the folder still stands there: another publisher may
            # have moved this one aside and be removing its files.
            with os.scandir(folder) as entries:
                names = {entry.name for entry in entries}
            if not names or storage.MANIFEST in names:
                return
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(folder), target.stat()):
                    break
        finally:
            os.close(folder)
    raise StorageError(f"{target}: holds files that are no artifact", "choose another folder, or empty this one")


def _make_locked(target: Path) -> tuple[Path, int]:
    """A new temporary folder, and a descriptor that holds its lock as long as this process lives."""
    number = 0
    while True:
        number += 1
        path = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{number}.tmp")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        lock = os.open(path, os.O_RDONLY)
        with suppress(OSError):  # some network file systems cannot lock folders; the process id remains
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path, lock


def _replace(temporary: Path, target: Path) -> None:
    old = temporary.with_suffix(".old.tmp")
    storage.remove(old)
    while True:
        # A folder cannot be renamed over another: for a moment nothing is there, which is one of the promised states.
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            temporary.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            storage.remove(old)  # another process published in that moment: replace that one as well
    storage.sync_folder(target.parent)
    storage.remove(old)


def sweep(target: Path) -> None:
    """Remove what processes of this machine that are no longer alive left beside `target`.

    If one was killed while it replaced the artifact, the old one is put back.
    """
    host = socket.gethostname()
    for path in sorted(target.parent.glob(f".{_escaped(target.name)}.{_escaped(host)}.*.tmp")):
        pid, *number = path.name.removeprefix(f".{target.name}.{host}.").split(".")
        # A restarted container has the same host name and process id as its predecessor; then the lock alone decides.
        before = number[:1] != ["tmp"] and pid == str(os.getpid())
        if not pid.isdigit() or (_alive(int(pid)) and not before) or _locked(path):
            continue
        if path.name.endswith(".old.tmp") and (path / storage.MANIFEST).is_file() and not target.exists():
            with suppress(OSError):
                path.rename(target)
                continue
        storage.remove(path)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _locked(path: Path) -> bool:
    """Whether a process holds the folder: one in another container has a process id that means nothing here."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
