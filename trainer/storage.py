"""URIs: local paths, `file://`, `s3://`, `gs://`, `abfs://` and `memory://`, through fsspec.

A stage works on local folders; `fetch` brings an input here, `send` puts a finished output there. A remote folder is
complete when its manifest.json is there, because `send` writes that last.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import MillraceError, StorageError

MANIFEST = "manifest.json"

_EXTRAS = {
    "s3": "pip install 'millrace[s3]'",
    "gs": "pip install gcsfs",
    "abfs": "pip install adlfs",
    "az": "pip install adlfs",
}
_BUCKETS = ("s3", "s3a", "gs", "gcs")
_FIXES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EROFS: "write to a folder that is not read-only",
    errno.EACCES: "grant the permission, or write elsewhere",
    errno.EPERM: "grant the permission, or write elsewhere",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed; check the path",
    errno.EISDIR: "a folder stands where a file is needed; check the path",
    errno.ENAMETOOLONG: "use shorter names",
    errno.EFBIG: "write to a file system that takes files of this size",
}
# What only whoever runs the stage can mend; any other error inside a stage is a bug, which deserves its traceback.
UNWRITABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG}
)


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
    if "\0" in text:
        raise StorageError(f"{text!r}: not a path", "remove the NUL character")
    try:
        return Path(text.removeprefix("file://")).expanduser()
    except RuntimeError:
        raise StorageError(f"{text}: no home folder of that user", "write the whole path") from None


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path inside it."""
    import fsspec

    protocol, _, rest = uri.partition("://")
    if protocol in _BUCKETS and {":", "@"} & set(rest.partition("/")[0]):
        message = f"{protocol}://***: a URI must not hold credentials"
        raise StorageError(message, "give them in the environment, for example AWS_ACCESS_KEY_ID, or in a profile")
    if protocol in _BUCKETS and not rest.strip("/"):
        raise StorageError(f"{uri}: names no bucket", f"write {protocol}://BUCKET/FOLDER")
    with explained(uri):
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"{uri}: {error}", _EXTRAS.get(protocol, "use a path, s3://, gs:// or abfs://")
            ) from None
    # Listings are cached per process, and other processes write to the store as well.
    fs.invalidate_cache()
    return fs, str(path)


@contextmanager
def explained(uri: str | Path, only: Collection[int] = ()) -> Iterator[None]:
    """Turn the operating system's and the object store's errors into a StorageError that names the URI and the fix.

    Args:
        uri: what is read or written.
        only: error numbers to turn; by default all, and for remote URIs the errors of their drivers as well.
    """
    try:
        yield
    except (MillraceError, BrokenPipeError):
        raise
    except OSError as error:
        if only and error.errno not in only:
            raise
        reason = error.strerror or str(error) or type(error).__name__
        place = error.filename if isinstance(error.filename, (str, Path)) else uri
        raise StorageError(f"{place}: {reason}", _FIXES.get(error.errno or 0, "check the path")) from error
    except Exception as error:
        # No credentials, no such host, an invalid bucket name: each driver has classes of its own for these.
        if only or not is_remote(str(uri)) or isinstance(error, (AssertionError, TypeError, AttributeError)):
            raise
        message = f"{uri}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise StorageError(message, "check the URI, the network and the credentials") from error


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
    source = source.rstrip("/")
    target = cache / (PurePosixPath(source).name or "root")
    with explained(uri):
        if not fs.exists(source):
            raise StorageError(f"{uri}: nothing there", "check the URI and the credentials")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not fs.isdir(source):
            fs.get_file(source, str(target))
            return target
        keys = [str(key) for key in fs.find(source) if not str(key).endswith("/")]  # such keys stand for folders
        names = {key: key.removeprefix(source).lstrip("/") for key in keys}
        for name in names.values():
            # Keys of object stores may hold anything, and this is about to become a path.
            if not name or ".." in PurePosixPath(name).parts or "\0" in name:
                raise StorageError(
                    f"{uri}: key {name!r} leads out of the folder", "do not use it: it was tampered with"
                )
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get(list(names), [str(target / name) for name in names.values()])
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
        except OSError as error:
            if error.filename == str(temporary):  # nobody asked for that one
                error.filename = str(path)
            raise
        finally:
            remove(temporary)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people and tools to read."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is not there or is none: a screen or page must not fail over a figure."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
    elif path.exists() or path.is_symlink():  # a read-only file system refuses to remove what is not there
        path.unlink(missing_ok=True)
