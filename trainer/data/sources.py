"""Where raw data comes from: a path, glob or folder, `s3://...`, `dvc:REPO@REV:PATH` or `builtin:NAME` -> local files."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainer import storage
from trainer.data import builtin, dvc_source
from trainer.data.version import data_version, file_md5, listing_md5, stream_md5
from trainer.errors import DataError

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_READABLE = "CSV, TSV, JSONL, JSON, plain text (.txt), Parquet, or a folder of pictures with labels.csv"


@dataclass(frozen=True)
class RawFile:
    """A raw file on this machine; `name` is what errors and rows call it."""

    path: Path
    name: str
    format: str


@dataclass(frozen=True)
class Source:
    """The files of a source in a fixed order, and their version (DVC's md5)."""

    files: list[RawFile]
    version: str


def resolve(source: str, form: str, work: Path) -> Source:
    """Bring a source here and list its files.

    Args:
        source: as in data.source.
        form: as in data.format; `auto` goes by the file names.
        work: folder for what has to be fetched or generated.

    Raises:
        DataError: there is nothing, nothing of a known format, or a file is empty.
        StorageError: a URI cannot be read.
    """
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        path = work / f"{name}.jsonl"
        builtin.write(name, path)
        return Source([RawFile(path, name, "jsonl")], file_md5(path))
    if source.startswith("dvc:"):
        root = dvc_source.fetch(source, work / "fetched")
    elif storage.is_remote(source):
        root = _from_store(source, work / "fetched")
    else:
        with storage.explained(source):
            return _local(source, form)
    return _listed(root, source, form)


def version(source: str, form: str, work: Path) -> str:
    """The version of a source as `resolve` finds it, without a copy on this machine of what is far away.

    Raises:
        DataError: there is nothing, or nothing of a known format.
        StorageError: a URI cannot be read.
    """
    if source.startswith("dvc:"):
        return dvc_source.md5(source) or resolve(source, form, work).version
    if not storage.is_remote(source):
        return resolve(source, form, work).version
    fs, place = storage.filesystem(source)
    with storage.explained(source):
        if not glob.has_magic(source) and fs.isfile(place):
            return _remote_md5(fs, place)
        names = _remote_files(fs, place, source)
        return listing_md5((name, _remote_md5(fs, key)) for key, name in names.items())


def _remote_files(fs: Any, place: str, source: str) -> dict[str, str]:
    """Key -> relative path of the objects below a prefix, or of those that match a glob."""
    place = place.rstrip("/")
    if glob.has_magic(source):
        keys = sorted(str(name) for name in fs.glob(place) if fs.isfile(name))
        root = os.path.commonpath([str(PurePosixPath(name).parent) for name in keys]) if keys else ""
    else:
        keys, root = [str(key) for key in fs.find(place) if not str(key).endswith("/")], place
    if not keys:
        raise DataError(f"data.source: {source}: no object matches", "correct the URI")
    return {key: key.removeprefix(root).lstrip("/") for key in keys}


def _remote_md5(fs: Any, key: str) -> str:
    with fs.open(key, "rb") as file:
        return stream_md5(file)


def _local(source: str, form: str) -> Source:
    path = storage.local_path(source)
    if path.exists():
        return _listed(path, source, form)
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not matches:
        what = "no file matches" if glob.has_magic(str(path)) else "no such file or folder"
        raise DataError(f"data.source: {source}: {what}", "correct the path")
    root = Path(os.path.commonpath([match.parent for match in matches]))
    named = [(match, match.relative_to(root).as_posix()) for match in matches]
    files = [RawFile(match, name, _format(match, form, source)) for match, name in named]
    _check_sizes(files)
    return Source(files, listing_md5((name, file_md5(match)) for match, name in named))


def _listed(root: Path, source: str, form: str) -> Source:
    """The files of a local file or folder."""
    if root.is_file():
        files = [RawFile(root, root.name, _format(root, form, source))]
    elif form == "images" or (form == "auto" and (root / "labels.csv").is_file()):
        if not (root / "labels.csv").is_file():
            raise DataError(
                f"data.source: {source}: no labels.csv",
                "add a labels.csv with a column of file names and one of labels",
            )
        files = [RawFile(root / "labels.csv", "labels.csv", "images")]
    else:
        inside = sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path.relative_to(root)))
        chosen = [path for path in inside if form != "auto" or path.suffix.lower() in FORMATS]
        if not chosen:
            raise DataError(
                f"data.source: {source}: no file of a known format in this folder", f"readable are {_READABLE}"
            )
        files = [RawFile(path, path.relative_to(root).as_posix(), _format(path, form, source)) for path in chosen]
    _check_sizes(files)
    return Source(files, data_version(root))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(path: Path, form: str, source: str) -> str:
    if form == "images":
        raise DataError(f"data.source: {source}: pictures are a folder with labels.csv, not a file", "pass the folder")
    if form != "auto":
        return form
    found = FORMATS.get(path.suffix.lower())
    if not found:
        message = f"data.source: {source}: the format of {path.name} cannot be told from its name"
        raise DataError(message, f"set data.format; readable are {_READABLE}")
    return found


def _check_sizes(files: list[RawFile]) -> None:
    for file in files:
        if file.path.stat().st_size == 0:
            raise DataError(f"{file.name}: the file is empty", "remove it, or fill it")


def _from_store(source: str, cache: Path) -> Path:
    """Copy an object, all objects below a prefix, or those that match a glob."""
    if not glob.has_magic(source):
        return storage.fetch(source, cache)
    fs, pattern = storage.filesystem(source)
    with storage.explained(source):
        found = sorted(str(name) for name in fs.glob(pattern) if fs.isfile(name))
        if not found:
            raise DataError(f"data.source: {source}: no object matches", "correct the URI")
        root = os.path.commonpath([str(PurePosixPath(name).parent) for name in found])
        for name in found:
            target = cache / PurePosixPath(name).relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))
    return cache
