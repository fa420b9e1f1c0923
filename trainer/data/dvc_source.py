"""Sources `dvc:REPO@REV:PATH`: a file or folder out of a DVC repository, and the version that the repository gives it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import DataError


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


def fetch(source: str, cache: Path) -> Path:
    """Copy the file or folder below `cache`; returns its path there.

    Raises:
        DataError: no such repository, revision or path.
    """
    with _opened(source) as (fs, path):
        target = cache / PurePosixPath(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get(path, str(target), recursive=fs.isdir(path))
        except Exception:
            shutil.rmtree(cache, ignore_errors=True)
            raise
    return target


def md5(source: str) -> str:
    """The md5 that the repository itself has for the file or folder, without a copy of it; empty where git tracks it.

    Raises:
        DataError: no such repository, revision or path.
    """
    with _opened(source) as (fs, path):
        found = fs.info(path).get("dvc_info") or {}
        return str(found.get("md5") or "")


@contextmanager
def _opened(source: str) -> Iterator[tuple[Any, str]]:
    """The repository's file system and the path inside it; what DVC, Git and the remotes raise becomes a DataError."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    repo, rev, path = parse_dvc(source)
    try:
        from dvc.api import DVCFileSystem
    except ImportError:
        raise DataError(f"data.source: {source}: DVC is not installed", "pip install dvc") from None
    try:
        fs: Any = DVCFileSystem(url=repo, rev=rev or None)
        if not fs.exists(path):
            raise DataError(f"data.source: {source}: the repository has no {path}", "correct the path or the revision")
        yield fs, path
    except DataError:
        raise
    except Exception as error:  # each of them raises classes of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.source: {source}: {reason}", "check repository, revision and path") from None
