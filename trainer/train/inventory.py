"""What checkpoints there are below a folder or URI, and whether they are whole: what `millrace checkpoint` shows.

A run's checkpoints stand beside each other in a folder of their own, such as SCRATCH/train-4f0c…/train. Imports no torch.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.artifacts import manifest
from trainer.errors import ArtifactError, ConfigError, MillraceError
from trainer.train.retention import KIND, is_best

COMPLETE = "complete"
_NAME = re.compile(r"(\.tmp-|\.old-|bad-)?step-(\d{9,})")
_STATES = {".tmp-": "unfinished", ".old-": "being removed", "bad-": "put aside: corrupted, or of another run"}


@dataclass(frozen=True)
class Entry:
    """A checkpoint.

    Attributes:
        run: URI of the folder that it stands in with others of its run.
        name: of its own folder.
        step: optimizer steps done.
        bytes: size of all its files.
        state: COMPLETE, or what is wrong with it.
        time: when it was written, seconds since 1970.
        best: whether no step before it had a better score.
        score: the best score until then, by name.
    """

    run: str
    name: str
    step: int
    bytes: int
    state: str
    time: float = 0.0
    best: bool = False
    score: tuple[tuple[str, float], ...] = ()

    @property
    def uri(self) -> str:
        """Where it is."""
        return f"{self.run}/{self.name}"


def listing(uri: str) -> list[Entry]:
    """The checkpoints below a folder or URI, by run and step. Names and sizes are looked at, not every byte.

    Raises:
        StorageError: it cannot be read.
    """
    fs, root = storage.filesystem(uri)
    with storage.explained(uri):
        # A step's own folder may be given too, so the last part of the path counts.
        above = root.rstrip("/").rpartition("/")[0]
        found: dict[tuple[str, str], dict[str, int]] = {}
        for key, info in fs.find(root, detail=True).items():
            parts = str(key).removeprefix(above).strip("/").split("/")
            at = next((i for i, part in enumerate(parts[:-1]) if _NAME.match(part)), None)
            if at is not None:
                run = "/".join([above, *parts[:at]])
                found.setdefault((run, parts[at]), {})["/".join(parts[at + 1 :])] = int(info["size"] or 0)
        scheme = f"{uri.partition('://')[0]}://" if storage.is_remote(uri) else ""
        entries = [_entry(fs, scheme, run, name, files) for (run, name), files in found.items()]
    return sorted(entries, key=lambda entry: (entry.run, entry.step, entry.name))


def _entry(fs: Any, scheme: str, run: str, name: str, files: dict[str, int]) -> Entry:
    prefix, step = _NAME.match(name).groups()  # type: ignore[union-attr]
    entry = Entry(f"{scheme}{run}", name, int(step), sum(files.values()), _STATES.get(prefix, ""))
    if entry.state:
        return entry
    if storage.MANIFEST not in files:
        return replace(entry, state=f"unfinished: no {storage.MANIFEST}")
    try:
        known = manifest.parse(fs.cat_file(f"{run}/{name}/{storage.MANIFEST}"), entry.uri, KIND)
    except ArtifactError as error:
        return replace(entry, state=error.message.removeprefix(f"{entry.uri}/"))
    record = known.record
    return replace(
        entry,
        state=next((f"corrupted: {file.path}" for file in known.files if files.get(file.path) != file.bytes), COMPLETE),
        time=float(record.get("time", 0.0)),
        best=is_best(known),
        score=tuple(record.get("score", {}).items()),
    )


def candidates(uri: str, step: int | None = None) -> list[Entry]:
    """What a run could go on from, or that one step; half-written and put-aside ones are left out.

    Raises:
        ArtifactError: there is none.
    """
    found = [entry for entry in listing(uri) if entry.name.startswith("step-") and step in (None, entry.step)]
    if not found:
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise ArtifactError(f"{uri}: {what}", "see `millrace checkpoint ls`; scratch folders go when a stage is done")
    return found


@contextmanager
def verified(entry: Entry) -> Iterator[Path]:
    """A local folder with a checkpoint each of whose bytes was checked.

    Raises:
        ArtifactError: a file is missing, surplus or altered; the message names the first.
        StorageError: it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="millrace-") as cache:
        place = storage.fetch(entry.uri, Path(cache))
        try:
            manifest.read(place, KIND)
        except MillraceError as error:
            message = error.message.replace(str(place), entry.uri)
            raise type(error)(message, "take another step, or train again") from None
        yield place


def chosen(uri: str, step: int | None) -> Entry:
    """The checkpoint of a step, or else the newest that is complete, of the only run there.

    Raises:
        ArtifactError: there is none.
        ConfigError: there are several runs.
    """
    found = candidates(uri, step)
    runs = sorted({entry.run for entry in found})
    if len(runs) > 1:
        raise ConfigError(f"{uri}: holds checkpoints of {len(runs)} runs", f"name one: {', '.join(runs)}")
    complete = [entry for entry in found if entry.state == COMPLETE]
    if not complete:
        raise ArtifactError(f"{found[-1].uri}: {found[-1].state}", "take another step, or train again")
    return complete[-1]
