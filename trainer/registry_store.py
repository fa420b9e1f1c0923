"""What the registry needs of a place to store it: list, read, create exclusively, replace, publish a folder.

On a local file system a folder is published by renaming it, which fails if the name is taken; on an object store by
creating a claim exclusively (`If-None-Match` on S3, its likes elsewhere, through fsspec) and writing one file last.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from trainer import storage
from trainer.artifacts.publish import sweep
from trainer.errors import StorageError


class Store(Protocol):
    """A place for a registry; paths are relative, with forward slashes."""

    def uri(self, path: str) -> str:
        """The full URI of a path."""

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted; none if it is not there."""

    def read(self, path: str) -> bytes | None:
        """Content of a file, or None if it is not there."""

    def create(self, path: str, content: bytes) -> bool:
        """Write a file that is not there yet, whole or not at all; False if it is there."""

    def replace(self, path: str, content: bytes) -> None:
        """Write a file atomically."""

    def lock(self, path: str) -> Any:
        """Context manager that keeps other processes of this kind out, where the store can."""

    def staging(self, path: str) -> Any:
        """Context manager with a local folder in which to build what `publish` then puts below `path`."""

    def publish(self, folder: Path, path: str, last: str) -> bool:
        """Make a built folder appear at `path`, complete when its file `last` is there; False if `path` is taken."""


def open_store(uri: str) -> Store:
    """The store at a URI."""
    return ObjectStore(uri) if storage.is_remote(uri) else LocalStore(storage.local_path(uri))


class LocalStore:
    """A folder of a local or network file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def uri(self, path: str) -> str:
        """The path, absolute or relative as the root was given."""
        return str(self.root / path)

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted; temporary ones (with a leading dot) are left out."""
        with storage.explained(self.root / path):
            try:
                return sorted(entry.name for entry in (self.root / path).iterdir() if not entry.name.startswith("."))
            except FileNotFoundError:
                return []

    def read(self, path: str) -> bytes | None:
        """Content of a file, or None."""
        with storage.explained(self.root / path):
            try:
                return (self.root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def create(self, path: str, content: bytes) -> bool:
        """Write aside, then link: the name appears with its whole content, and only if it was free."""
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
        with storage.explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep_files(target)
            try:
                write_durably(temporary, content)
                _link(temporary, target, content)
                storage.sync_folder(target.parent)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def replace(self, path: str, content: bytes) -> None:
        """Write aside, then rename; the name aside is unique among threads and hosts too."""
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
        with storage.explained(target):
            _sweep_files(target)
            try:
                write_durably(temporary, content)
                temporary.replace(target)
                storage.sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """An advisory lock of the kernel: gone with the process that held it, however it ended.

        Where the file system has no locks it is none, and what is exclusive is what `create` writes.
        """
        target = self.root / path
        with storage.explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def staging(self, path: str) -> Iterator[Path]:
        """A hidden folder beside the target; those of dead processes are removed."""
        place = self.root / path
        with storage.explained(place):
            place.mkdir(parents=True, exist_ok=True)
            sweep(place / "new")
            folder = place / f".new.{socket.gethostname()}.{os.getpid()}.tmp"
            storage.remove(folder)
            folder.mkdir()
        try:
            with storage.explained(place):
                yield folder
        finally:
            storage.remove(folder)

    def publish(self, folder: Path, path: str, last: str) -> bool:
        """Rename; a folder that is not empty is never replaced by that."""
        target = self.root / path
        if target.exists():
            return False
        storage.sync_folder(folder)
        try:
            folder.rename(target)
        except FileExistsError:
            return False
        except OSError as error:
            if target.exists():
                return False
            raise StorageError(f"{target}: {error.strerror}", "check the registry's permissions") from error
        storage.sync_folder(target.parent)
        return True


class ObjectStore:
    """A prefix of an object store, through fsspec."""

    def __init__(self, uri: str) -> None:
        self.root = uri
        self.fs, self.path = storage.filesystem(uri)

    def uri(self, path: str) -> str:
        """The URI of a path below the root."""
        return f"{self.root}/{path}"

    def names(self, path: str) -> list[str]:
        """Names below a prefix, sorted."""
        self.fs.invalidate_cache()
        with storage.explained(self.uri(path)):
            try:
                found = self.fs.ls(f"{self.path}/{path}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found})

    def read(self, path: str) -> bytes | None:
        """Content of an object, or None."""
        with storage.explained(self.uri(path)):
            try:
                return bytes(self.fs.cat_file(f"{self.path}/{path}"))
            except FileNotFoundError:
                return None

    def create(self, path: str, content: bytes) -> bool:
        """A conditional put: the store itself decides who was first."""
        with storage.explained(self.uri(path)):
            try:
                self.fs.pipe_file(f"{self.path}/{path}", content, mode="create")
            except FileExistsError:
                return False
        return True

    def replace(self, path: str, content: bytes) -> None:
        """A put, which is atomic."""
        with storage.explained(self.uri(path)):
            self.fs.pipe_file(f"{self.path}/{path}", content)

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """Object stores have no locks; `create` decides."""
        yield

    @contextmanager
    def staging(self, path: str) -> Iterator[Path]:
        """A temporary folder of this machine."""
        with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
            yield Path(folder)

    def publish(self, folder: Path, path: str, last: str) -> bool:
        """Claim the name, put the files, then `last`. What a killed promoter leaves is a claimed number without it."""
        if not self.create(f"{path}/claim", b""):
            return False
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        with storage.explained(self.uri(path)):
            for name in sorted(files, key=lambda name: name == last):
                self.fs.put_file(str(folder / name), f"{self.path}/{path}/{name}")
        return True


def _sweep_files(target: Path) -> None:
    """Remove temporary files beside `target` whose process, of this machine, is no longer alive."""
    start = f".{target.name}.{socket.gethostname()}."
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(start).split(".")[0]
        if not path.name.startswith(start) or not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            continue


def _link(temporary: Path, target: Path, content: bytes) -> None:
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links (exFAT, some mounts): still exclusive, but no longer whole after a crash.
        write_durably(target, content)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of plain files, durably."""
    with storage.explained(target):
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.is_dir():
                copy_tree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)
                with open(target / path.name, "rb") as file:
                    os.fsync(file.fileno())
        storage.sync_folder(target)
