"""Which checkpoints of a folder stay: the newest complete ones and the best; damaged ones are put aside for a while.

    step-000000100/                 complete
    .tmp-step-000000200-…/          being written, or left by a kill
    .old-step-000000050-…/          being removed, or left by a kill
    bad-step-000000150.1795312800/  put aside at that time (seconds since 1970): damaged, or of another run

Nothing is removed under the name of a complete checkpoint: it is renamed first.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from trainer import log, storage
from trainer.artifacts import manifest
from trainer.errors import ArtifactError, MillraceError

KIND = "checkpoint"
PREFIX, UNFINISHED, OLD, ASIDE = "step-", ".tmp-", ".old-", "bad-"
# A damaged checkpoint is kept so long for whoever wants to know what happened to it.
ASIDE_S = 30 * 60.0


def name_of(step: int) -> str:
    """Name of the checkpoint of a step; names sort as steps do."""
    return f"{PREFIX}{step:09d}"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whatever their state; none where there is no folder.

    Raises:
        OSError: the folder cannot be listed (`glob` would find nothing in it, and the run would begin anew).
    """
    try:
        return sorted((place for place in folder.iterdir() if place.name.startswith(PREFIX)), reverse=True)
    except FileNotFoundError:
        return []


def check(place: Path, identity: str) -> manifest.Manifest:
    """Check the digests of a checkpoint and that it belongs to this run.

    Raises:
        ArtifactError: it is incomplete, corrupted, or another run's.
        StorageError: it cannot be read, which says nothing about what it holds.
    """
    found = manifest.read(place, KIND)
    if found.meta.get("identity") != identity:
        raise ArtifactError(f"{place}: belongs to a run with other parameters", "remove it")
    return found


def put_aside(place: Path, reason: str) -> None:
    """Say why a checkpoint is not taken, and rename it; on a read-only disk it stays where it is."""
    log.say(f"checkpoint {place.name} passed over: {reason}")
    with suppress(OSError):
        place.rename(place.with_name(f"{ASIDE}{place.name}.{int(time.time())}"))


def sweep(folder: Path) -> None:
    """Remove what kills have left: half-written and half-removed ones. For the beginning, when nobody writes."""
    for pattern in (UNFINISHED, OLD):
        for stale in folder.glob(f"{pattern}*"):
            storage.remove(stale)


def is_best(content: manifest.Manifest) -> bool:
    """Whether the checkpoint's step had the best score until then; of several such, the newest is the best."""
    return bool(content.record.get("best"))


def prune(folder: Path, keep: int, keep_best: bool, spared: Collection[str] = ()) -> None:
    """Remove checkpoints beyond the newest `keep` and the best; to be called after a good one was written.

    Args:
        folder: the folder.
        keep: newest checkpoints to keep.
        keep_best: keep the best one as well.
        spared: names that stay in any case.
    """
    for old in surplus(newest_first(folder), keep, keep_best):
        if old.name not in spared:
            discard(old)
    for left in folder.glob(f"{OLD}*"):
        storage.remove(left)
    for bad in folder.glob(f"{ASIDE}*"):
        since = bad.name.rpartition(".")[2]
        if not since.isdigit() or time.time() - int(since) >= ASIDE_S:
            storage.remove(bad)


def surplus(places: list[Path], keep: int, keep_best: bool) -> list[Path]:
    """Those of the checkpoints, given newest first, that are neither among the newest nor the best."""
    if not keep_best:
        return places[keep:]
    best = next((place for place in places if _is_best(place)), None)
    return [place for place in places[keep:] if place != best]


def _is_best(place: Path) -> bool:
    try:
        return is_best(manifest.read(place, KIND, verify=False))
    except MillraceError:
        return False


def discard(place: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves nothing half under its name."""
    aside = place.with_name(f"{OLD}{place.name}-{time.time_ns():x}")
    place.rename(aside)
    storage.remove(aside)
