"""URIs: local paths, `file://`, `s3://`, `gs://`, `abfs://` and `memory://`, through fsspec.

A stage works on local folders; `fetch` brings an input here, `send` puts a finished output there. A remote folder is
complete when its manifest.json is there, because `send` writes that last.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import StorageError

MANIFEST = "manifest.json"

_EXTRAS = {
    "s3": "pip install 'millrace[s3]'",
    "gs": "pip install gcsfs",
    "abfs": "pip install adlfs",
    "az": "pip install adlfs",
}
_FIXES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EROFS: "write to a folder that is not read-only",
    errno.EACCES: "grant the permission, or write elsewhere",
    errno.EPERM: "grant the permission, or write elsewhere",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed; check the path",
    errno.EISDIR: "a folder stands where a file is needed; check the path",
}


def is_remote(uri: str) -> bool:
    """Whether the URI names something that is not on this machine's file system."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str | Path) -> Path:
    """The path of a local URI.

    Raises:
        StorageError: the URI is remote.
    """
    text = str(uri)
    if is_remote(text):
        raise StorageError(f"{text}: not a local path", "use a path of this machine")
    return Path(text.removeprefix("file://")).expanduser()


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path inside it."""
    import fsspec

    protocol = uri.split("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{uri}: {error}", _EXTRAS.get(protocol, "use a path, s3://, gs:// or abfs://")) from None
    return fs, str(path)


@contextmanager
def explained(uri: str | Path) -> Iterator[None]:
    """Turn the operating system's and the object store's errors into a StorageError that names the URI and the fix."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(
            f"{error.filename or uri}: {reason}", _FIXES.get(error.errno or 0, "check the path")
        ) from error


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(uri):
        return local_path(uri).exists()
    fs, path = filesystem(uri)
    with explained(uri):
        return bool(fs.exists(path))


def fetch(uri: str, cache: Path) -> Path:
    """A local folder or file with the content of the URI: the path itself if local, else a copy below `cache`.

    Raises:
        StorageError: there is nothing at the URI, or it cannot be read.
    """
    if not is_remote(uri):
        path = local_path(uri)
        if not path.exists():
            raise StorageError(f"{uri}: no such file or folder", "run the stage that makes it, or correct the path")
        return path
    fs, source = filesystem(uri)
    target = cache / PurePosixPath(source.rstrip("/")).name
    with explained(uri):
        if not fs.exists(source):
            raise StorageError(f"{uri}: nothing there", "check the URI and the credentials")
        target.parent.mkdir(parents=True, exist_ok=True)
        if fs.isdir(source):
            fs.get(source.rstrip("/") + "/", str(target) + "/", recursive=True)
        else:
            fs.get(source, str(target))
    return target


def send(folder: Path, uri: str) -> None:
    """Copy a finished artifact folder to a remote URI, its manifest last; what an older artifact left there is removed."""
    fs, target = filesystem(uri)
    target = target.rstrip("/")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with explained(uri):
        if fs.exists(f"{target}/{MANIFEST}"):
            fs.rm(f"{target}/{MANIFEST}")
        stale = {str(name) for name in fs.find(target)} if fs.exists(target) else set()
        for name in sorted(files, key=lambda name: name == MANIFEST):
            fs.put_file(str(folder / name), f"{target}/{name}")
        for name in stale - {f"{target}/{name}" for name in files}:
            if fs.exists(name):
                fs.rm(name)


def read_bytes(uri: str) -> bytes:
    """The content of a file."""
    with explained(uri):
        if not is_remote(uri):
            return local_path(uri).read_bytes()
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))


def write_atomic(path: Path, content: bytes) -> None:
    """Write a local file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, after files were created in it or renamed into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a local file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
