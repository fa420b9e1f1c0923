"""Where raw data comes from: a path, glob or folder, `s3://...`, `dvc:REPO@REV:PATH` or `builtin:NAME` -> local files."""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainer import storage
from trainer.data import builtin
from trainer.data.version import data_version, file_md5, listing_md5
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
        root = _from_dvc(source, work / "fetched")
    elif storage.is_remote(source):
        root = _from_store(source, work / "fetched")
    else:
        with storage.explained(source):
            return _local(source, form)
    return _listed(root, source, form)


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


def _from_dvc(source: str, cache: Path) -> Path:
    """Copy a file or folder out of a DVC repository: `dvc:REPO@REV:PATH` (REV may be left out)."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    repo, rev, path = parse_dvc(source)
    try:
        from dvc.api import DVCFileSystem
    except ImportError:
        raise DataError(f"data.source: {source}: DVC is not installed", "pip install dvc") from None
    target = cache / PurePosixPath(path).name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        fs: Any = DVCFileSystem(url=repo, rev=rev or None)
        if not fs.exists(path):
            raise DataError(f"data.source: {source}: the repository has no {path}", "correct the path or the revision")
        fs.get(path, str(target), recursive=fs.isdir(path))
    except DataError:
        raise
    except Exception as error:  # DVC, Git and each remote raise classes of their own
        shutil.rmtree(cache, ignore_errors=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.source: {source}: {reason}", "check repository, revision and path") from None
    return target


def parse_dvc(source: str) -> tuple[str, str, str]:
    """`dvc:REPO@REV:PATH` -> (repository, revision or "", path). The repository may hold `:` and `@`, the path neither."""
    repo, _, path = source.removeprefix("dvc:").rpartition(":")
    head, at, rev = repo.rpartition("@")
    # The @ of user@host comes before the path of a URL, or before the : of git@host:path, which no revision has.
    is_user = "://" in head and "/" not in head.partition("://")[2]
    if at and head and not is_user and ":" not in rev:
        repo = head
    else:
        rev = ""
    if not repo or not path:
        raise DataError(
            f"data.source: {source}: not of the form dvc:REPO@REV:PATH", "for example dvc:.@v1:data/raw.csv"
        )
    return repo, rev, path
