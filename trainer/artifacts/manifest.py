"""manifest.json: what an artifact folder holds, with a sha256 of each file and of the manifest itself.

    {"format": 1, "kind": "model", "digest": "…", "files": [{"path", "bytes", "sha256", "volatile"}],
     "meta": {…}, "record": {…}, "seal": "…"}

`digest` identifies the content: it covers `kind`, `meta` and the files that are not volatile, so that two runs with
the same inputs agree in it. `record` (times, versions, host) and volatile files (latencies, logs) may differ between
such runs. `seal` covers everything, so that one flipped byte anywhere is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import ArtifactError
from trainer.storage import MANIFEST, explained, sync_folder, write_atomic

FORMAT = 1
REBUILD = "run the stage that makes it again"


class OtherFormat(ArtifactError):
    """An intact manifest of another version."""


@dataclass(frozen=True)
class File:
    """A file of an artifact; `path` is relative, with forward slashes."""

    path: str
    bytes: int
    sha256: str
    volatile: bool = False


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    kind: str
    digest: str
    files: tuple[File, ...]
    meta: dict[str, Any]
    record: dict[str, Any]


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_durable(path: Path) -> str:
    """Wait until a file's content is on the disk; its hex sha256."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return sha256


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _digest(kind: str, meta: dict[str, Any], files: Iterable[File]) -> str:
    content = [[file.path, file.bytes, file.sha256] for file in files if not file.volatile]
    return hashlib.sha256(canonical([kind, meta, content])).hexdigest()


def _serialise(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False).encode()


def seal(
    folder: Path,
    kind: str,
    meta: dict[str, Any],
    record: dict[str, Any],
    volatile: Collection[str] = (),
    known: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the manifest of a folder whose files are complete, and make all of it durable.

    Args:
        folder: the folder.
        kind: dataset, model, ...
        meta: facts about the content that are the same in every run with the same inputs.
        record: facts about this run.
        volatile: relative paths of files whose content may differ between such runs.
        known: sha256 of files, by relative path, that their writers have made durable themselves.
    """
    files = []
    folders = {folder}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(f"{path}: an artifact holds no symbolic links", "write a plain file")
        if path.is_dir():
            folders.add(path)
        elif path.name != MANIFEST or path.parent != folder:
            name = path.relative_to(folder).as_posix()
            sha256 = (known or {}).get(name) or make_durable(path)
            files.append(File(name, path.stat().st_size, sha256, name in volatile))
    body = {
        "format": FORMAT,
        "kind": kind,
        "digest": _digest(kind, meta, files),
        "files": [vars(file) for file in files],
        "meta": meta,
        "record": record,
    }
    body["seal"] = hashlib.sha256(canonical(body)).hexdigest()
    for each in folders:
        sync_folder(each)
    write_atomic(folder / MANIFEST, _serialise(body))
    return Manifest(kind, str(body["digest"]), tuple(files), meta, record)


def read(folder: str | Path, kind: str = "", *, verify: bool = True) -> Manifest:
    """Read and check the manifest of a folder; with `verify`, the digest of each file too.

    Raises:
        ArtifactError: no manifest, not ours, of another kind, altered, or a file is missing, surplus or altered.
        StorageError: a file is there but cannot be read.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    with explained(path):
        if not _is_plain(path):
            raise ArtifactError(f"{folder}: not a complete artifact (no {MANIFEST})", REBUILD)
        content = path.read_bytes()
    manifest = parse(content, str(folder), kind)
    if verify:
        _verify(folder, manifest)
    return manifest


def parse(content: bytes, folder: str, kind: str = "") -> Manifest:
    """Check the content of a manifest, as `read` does; `folder` is what messages call the place where it was read."""
    path = f"{folder}/{MANIFEST}"
    try:
        body = json.loads(content)
        # The same JSON can be written in other bytes (1E5 for 1e5): those were not written by us.
        intact = _serialise(body) == content
        expected = body.pop("seal")
        intact = intact and hashlib.sha256(canonical(body)).hexdigest() == expected
        manifest = Manifest(
            body["kind"], body["digest"], tuple(File(**file) for file in body["files"]), body["meta"], body["record"]
        )
        found_format = body["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArtifactError(f"{path}: corrupted, not a manifest", REBUILD) from None
    if not intact:
        raise ArtifactError(f"{path}: corrupted, its content does not match its seal", REBUILD)
    if found_format != FORMAT:
        raise OtherFormat(f"{path}: format {found_format}, this version reads {FORMAT}", REBUILD)
    if kind and manifest.kind != kind:
        raise ArtifactError(f"{folder}: holds a {manifest.kind}, a {kind} is needed", "pass the right folder")
    return manifest


def _verify(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        path = safe_path(folder, file.path)
        with explained(path):
            if not _is_plain(path):
                raise ArtifactError(f"{path}: missing", REBUILD)
            if path.stat().st_size != file.bytes or sha256_file(path) != file.sha256:
                raise ArtifactError(f"{path}: corrupted, its content does not match its digest", REBUILD)
    if _digest(manifest.kind, manifest.meta, manifest.files) != manifest.digest:
        raise ArtifactError(f"{folder}: corrupted, its digest does not match its files", REBUILD)
    known = {file.path for file in manifest.files} | {MANIFEST}
    for path in folder.rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in known:
            raise ArtifactError(f"{path}: not in the manifest", f"remove it, or {REBUILD}")


def _is_plain(path: Path) -> bool:
    """Whether a file, not a link, is there; what cannot be told (no permission, a broken disk) is an OSError."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def safe_path(folder: Path, name: str) -> Path:
    """`folder/name`, provided that it stays inside the folder.

    Raises:
        ArtifactError: the name is absolute, has `..` or leads out through a link.
    """
    pure = PurePosixPath(name)
    path = folder / name
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise ArtifactError(
            f"{name!r}: not a path inside the artifact", "do not use this artifact: it was tampered with"
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path}: leads out of the artifact", "do not use this artifact: it was tampered with")
    return path
