"""Checkpoints of a run: torch DCP shards under our manifest, complete or not there at all.

    SCRATCH/step-000000100/{__0_0.distcp, .metadata, state.json, rng-0000.json, manifest.json}

A checkpoint is written to a temporary folder, sealed with the sha256 of each file, made durable and renamed. When one
is read, the digests are checked first: DCP itself checks no bytes, and its `.metadata` is a pickle. That pickle is
read by an unpickler that knows DCP's own classes only. What does not pass is reported, put aside as `bad-…` and
passed over for the one before it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import log, storage
from trainer.artifacts import manifest
from trainer.errors import ArtifactError, MillraceError, StorageError
from trainer.parallel.group import Ranks

KIND = "checkpoint"
STATE = "state.json"
# Saving may take at most this share of the time; a preemption's save is exempt.
SHARE = 0.02


class Checkpoints:
    """The checkpoints in a folder that all ranks see.

    Args:
        folder: the folder; None keeps nothing.
        keep: complete checkpoints to keep.
        ranks: the ranks that save and load together.
        identity: what the run is; a checkpoint of another run is passed over.
    """

    def __init__(self, folder: Path | None, keep: int, ranks: Ranks, identity: str) -> None:
        self.folder, self.keep, self.ranks, self.identity = folder, keep, ranks, identity
        self._last_end = time.monotonic()
        self._last_cost = 0.0
        self._saved_step = -1

    def due(self) -> bool:
        """Whether enough time has passed that a save costs little; the same answer on every rank."""
        if self.folder is None:
            return False
        return bool(self.ranks.from_first(time.monotonic() - self._last_end >= self._last_cost / SHARE))

    def save(self, step: int, tree: dict[str, Any], rng: dict[str, Any]) -> None:
        """Write a durable checkpoint, and remove those beyond `keep`.

        Args:
            step: optimizer steps done; names the checkpoint.
            tree: nested dicts and lists of tensors and JSON values, equal on every rank.
            rng: this rank's generators.

        Raises:
            StorageError: it could not be written; older checkpoints are untouched.
        """
        if self.folder is None or step == self._saved_step:
            return
        from trainer.train.dcp import save_tensors  # heavy: imported when first needed, and not part of a save's cost

        start = time.monotonic()
        target = self.folder / f"step-{step:09d}"
        temporary = self.folder / f".tmp-{target.name}"
        plain, tensors = split(tree)
        self._together(lambda: self._begin(temporary, plain, step))
        rng_file = temporary / f"rng-{self.ranks.rank:04d}.json"
        self._together(lambda: storage.write_atomic(rng_file, json.dumps(rng).encode()), anywhere=True)
        save_tensors(temporary, tensors, self.ranks)
        self._together(lambda: self._finish(temporary, target, step))
        self._saved_step = step
        self._last_end = time.monotonic()
        self._last_cost = self._last_end - start

    def load(self) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The newest checkpoint that passes all checks: its tree, and this rank's generators if it had them."""
        if self.folder is None:
            return None
        while True:
            found = self._newest() if self.ranks.rank == 0 else None
            found = self.ranks.from_first(found)
            if found is None:
                return None
            place, loaded, problem = self.folder / found, None, ""
            try:
                loaded = self._read(place)
            except MillraceError as error:
                problem = error.message
            # All ranks take the same one, or none does.
            problems = list(filter(None, self.ranks.gather(problem)))
            if loaded is not None and not problems:
                break
            if self.ranks.rank == 0:
                _pass_over(place, problems[0])
        if self.ranks.rank == 0:
            log.say(f"resuming from checkpoint {found}")
        self._saved_step = loaded[2]
        self._last_end = time.monotonic()
        return loaded[:2]

    def _read(self, place: Path) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
        """Tree, generators and step of a checkpoint whose digests were checked."""
        from trainer.train.dcp import load_tensors

        plain = json.loads((place / STATE).read_bytes())
        tree = join(plain["tree"], load_tensors(place))
        rng = place / f"rng-{self.ranks.rank:04d}.json"
        # Another number of ranks: the order of the data goes on, dropout starts anew.
        same = plain["ranks"] == self.ranks.size and rng.is_file()
        return tree, json.loads(rng.read_bytes()) if same else None, int(plain["step"])

    def _newest(self) -> str | None:
        assert self.folder is not None
        for stale in self.folder.glob(".tmp-*"):
            storage.remove(stale)
        for place in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                check(place, self.identity)
            except MillraceError as error:
                _pass_over(place, error.message)
                continue
            return place.name
        return None

    def _begin(self, temporary: Path, plain: Any, step: int) -> None:
        storage.remove(temporary)
        temporary.mkdir(parents=True)
        content = {"step": step, "ranks": self.ranks.size, "tree": plain}
        (temporary / STATE).write_text(json.dumps(content), encoding="utf-8")

    def _finish(self, temporary: Path, target: Path, step: int) -> None:
        assert self.folder is not None
        manifest.seal(temporary, KIND, {"identity": self.identity, "step": step}, {})
        storage.remove(target)
        temporary.rename(target)
        storage.sync_folder(self.folder)
        # The one just written is good, so older and broken ones may go.
        for old in sorted(self.folder.glob("step-*"), reverse=True)[self.keep :]:
            storage.remove(old)
        for bad in self.folder.glob("bad-*"):
            storage.remove(bad)

    def _together(self, work: Any, *, anywhere: bool = False) -> None:
        """Do something on rank 0 (or on each rank); an error there is raised on every rank."""
        problem: tuple[str, str] | None = None
        if anywhere or self.ranks.rank == 0:
            try:
                with storage.explained(str(self.folder)):
                    work()
            except MillraceError as error:
                problem = (error.message, error.hint)
        for found in self.ranks.gather(problem):
            if found:
                raise StorageError(f"checkpoint: {found[0]}", found[1])


def _pass_over(place: Path, reason: str) -> None:
    """Say why a checkpoint is not taken, and put it aside."""
    log.say(f"checkpoint {place.name} passed over: {reason}")
    bad = place.with_name(f"bad-{place.name}")
    storage.remove(bad)
    place.rename(bad)


def check(place: Path, identity: str) -> None:
    """Check the digests of a checkpoint and that it belongs to this run.

    Raises:
        ArtifactError: it is incomplete, corrupted, or another run's.
    """
    found = manifest.read(place, KIND)
    if found.meta.get("identity") != identity:
        raise ArtifactError(f"{place}: belongs to a run with other parameters", "remove it")


def split(tree: Any, path: str = "", tensors: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Divide nested dicts, lists and tuples into a JSON value and the tensors in it, by path."""
    tensors = {} if tensors is None else tensors
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach()
        return {"tensor": path}, tensors
    if isinstance(tree, dict):
        # As pairs: the keys of an optimizer's state are numbers, which JSON objects cannot have.
        return {"dict": [[key, split(value, f"{path}/{key}", tensors)[0]] for key, value in tree.items()]}, tensors
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [split(value, f"{path}/{i}", tensors)[0] for i, value in enumerate(tree)]}, tensors
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree, tensors
    raise TypeError(f"{path}: a {type(tree).__name__} cannot be kept in a checkpoint")


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """What `split` divided, whole again."""
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: join(item, tensors) for key, item in value}
    items = [join(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)
