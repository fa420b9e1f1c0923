"""Checkpoints of a run: torch DCP shards under our manifest, complete or not there at all.

    SCRATCH/step-000000100/{__0_0.distcp, .metadata, state.json, rng-0000.json, model.json, tokenizer.json,
                            manifest.json}

Training stops only for as long as it takes to copy its tensors to the host's memory. A thread then writes them to a
temporary folder, makes them durable, seals them with the sha256 of each file and renames. Over several ranks each
writes its own share, and the first one's thread finds the others' on the folder that all share: the threads use no
collectives, which could come between those of training.

When a checkpoint is read, the digests are checked first: DCP itself checks no bytes, and its `.metadata` is a pickle.
That pickle is read by an unpickler that knows DCP's own classes only. What is damaged is reported, put aside as
`bad-…` and passed over for the one before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from trainer import log, storage
from trainer.artifacts import manifest
from trainer.errors import ArtifactError, MillraceError, StorageError
from trainer.parallel.group import Ranks
from trainer.train import retention
from trainer.train.remote import Store
from trainer.train.staging import Staging, join, local, merge, split
from trainer.train.writing import Writing

if TYPE_CHECKING:
    from trainer.train.dcp import Like, Share

STATE = "state.json"
# Saving may take at most this share of the time; durable saves are exempt.
SHARE = 0.02
# How long a copy to the store may hold up a process that was told to end, or one that is done.
STORE_GRACE_S, STORE_END_S = 5.0, 600.0
# Schedulers kill some time after SIGTERM, torchrun after 30 s: a durable save should take less than this.
PROMISED_S = 10.0
# How long a save in flight may hold up a process that ends by an error.
GRACE_S = 5.0


class Checkpoints:
    """The checkpoints in a folder that all ranks see. At the end of a `with` nothing of it is at work any more.

    Args:
        folder: the folder; None keeps nothing.
        keep: newest complete checkpoints to keep.
        ranks: the ranks that save and load together.
        identity: what the run is; a checkpoint of another run is passed over.
        keep_best: also keep the one of the best score.
        asynchronous: write in the background, from a copy.
        store: URI under which complete ones are copied; empty copies none.
        files: files for each checkpoint, by name: what `millrace checkpoint export` needs besides the tensors.
        device: where the tensors are.
        parts: ranks have different parts of the tree, by name.
    """

    def __init__(
        self,
        folder: Path | None,
        keep: int,
        ranks: Ranks,
        identity: str,
        *,
        keep_best: bool = True,
        asynchronous: bool = True,
        store: str = "",
        files: Mapping[str, bytes] | None = None,
        device: torch.device | None = None,
        parts: bool = False,
    ) -> None:
        self.folder, self.keep, self.ranks, self.identity = folder, keep, ranks, identity
        self.keep_best, self.asynchronous, self.files = keep_best, asynchronous, dict(files or {})
        self.device, self.parts = device or torch.device("cpu"), parts
        self.stored = bool(store and folder)
        self.store: Store | None = None
        if store and folder and ranks.rank == 0:  # its threads are those of rank 0
            self.store = Store(f"{store.rstrip('/')}/{folder.name}-{identity[:12]}", identity, keep, keep_best)
        self._staging = Staging()
        self._layout: Any = None
        self._plans: list[Any] = [None] * ranks.size
        self._share: Share | None = None
        self._writing: Writing | None = None
        self._told = False
        self._last_end = time.monotonic()
        self._last_cost = 0.0
        self._saved_step = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # No collectives here: other ranks may be gone.
        if self._writing:
            self._writing.end(GRACE_S if error else None)
        if self.store:
            self.store.wait(STORE_GRACE_S if error else STORE_END_S)

    # -- saving -----------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether a save would cost little now: the last one is done, and long enough ago. The same on every rank."""
        if self.folder is None:
            return False
        cost = self._last_cost
        if self._writing and self.device.type == "cpu":
            cost += self._writing.cpu_s  # the thread takes it from training, on cores that both have
        idle = not (self._writing and self._writing.busy())
        return bool(self.ranks.from_first(idle and time.monotonic() - self._last_end >= cost / SHARE))

    def due_at_end(self) -> bool:
        """Whether a save at the end of the run is worth its while: a run too short for any is as soon repeated."""
        return self.stored or (self._saved_step >= 0 and self.due())

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed on this rank; when it has on any, all are to call `settle`."""
        return self._writing is not None and self._writing.problem is not None

    def save(
        self,
        step: int,
        tree: dict[str, Any],
        rng: dict[str, Any],
        *,
        durable: bool = False,
        best: bool = False,
        score: Mapping[str, float] | None = None,
    ) -> None:
        """Save the state as it is now; on all ranks together.

        Args:
            step: optimizer steps done; names the checkpoint.
            tree: nested dicts and lists of tensors and JSON values. Plain tensors are equal on every rank that has
                them and are written once; of DTensors each rank writes its shard.
            rng: this rank's generators.
            durable: come back when it is on the disk. Otherwise it is left out where one is still being written.
            best: this step has the best score so far.
            score: that score by its name, for people.

        Raises:
            StorageError: it, or the one before it, could not be written; older checkpoints are untouched.
        """
        if self.folder is None:
            return
        if step == self._saved_step:
            if durable:
                self.settle()
            return
        from trainer.train import dcp  # heavy: when first needed, and no part of a save's cost

        start = time.monotonic()
        plain, tensors = split(tree)
        changed = dcp.Planner().mine(tensors) if self._is_new(tensors) else None
        busy = self._writing is not None and self._writing.busy()
        # One exchange tells all that must be agreed on.
        replies = self.ranks.gather((busy, self.failed, changed, f"{time.time_ns():x}", plain if self.parts else None))
        plans = [reply[2] for reply in replies]
        if self._share is None or any(plans):
            self._plans = [new or old for new, old in zip(plans, self._plans, strict=True)]
            self._share = dcp.divide(self._plans, self.ranks.rank)
        if any(failed for _, failed, *_ in replies):
            self.settle()
        if any(busy for busy, *_ in replies):
            if not durable:
                return
            self.settle()
        target = retention.name_of(step)
        self._writing = Writing(
            step=step,
            temporary=self.folder / f"{retention.UNFINISHED}{target}-{replies[0][3]}",
            share=self._share,
            held=self._held(tensors),
            values=self._values(step, merge([reply[4] for reply in replies]) if self.parts else plain, rng),
            files=self.files if self.ranks.rank == 0 else {},
            meta={"identity": self.identity, "step": step},
            record={"time": time.time(), "best": best, "score": dict(score or {}), "ranks": self.ranks.size},
            ranks=(self.ranks.rank, self.ranks.size),
            device=self.device,
            complete=self._complete,
        )
        self._writing.start()
        self._saved_step = step
        if durable or not self.asynchronous:
            self.settle()
        self._last_end = time.monotonic()
        self._last_cost = self._last_end - start

    def settle(self) -> None:
        """Wait for the save in flight; on all ranks together.

        Raises:
            StorageError: it could not be written, on this rank or another.
        """
        writing = self._writing
        if writing is None:
            return
        writing.wait_for_share()
        problems = self._problems(writing)
        if problems:
            writing.end(0.0)
        writing.end()
        problems = problems or self._problems(writing)
        self._writing = None
        if problems:
            self._saved_step = -1
            if self.ranks.rank == 0:
                storage.remove(writing.temporary)
            message, hint = problems[0]
            raise StorageError(f"checkpoint of step {writing.step}: {message}", hint)

    def _problems(self, writing: Writing) -> list[tuple[str, str]]:
        return [found for found in self.ranks.gather(writing.problem) if found]

    def _is_new(self, tensors: dict[str, Tensor]) -> bool:
        """Whether there are other tensors than the last time, or divided otherwise."""
        before = self._layout
        self._layout = [(name, t.shape, t.dtype, getattr(t, "placements", None)) for name, t in tensors.items()]
        return bool(self._layout != before)

    def _held(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.asynchronous:
            return self._staging.copy(tensors)
        return {name: local(tensor) for name, tensor in tensors.items()}

    def _values(self, step: int, plain: Any, rng: dict[str, Any]) -> dict[str, Any]:
        values = {f"rng-{self.ranks.rank:04d}.json": rng}
        if self.ranks.rank == 0:
            values[STATE] = {"step": step, "ranks": self.ranks.size, "tree": plain}
        return values

    def _complete(self, writing: Writing) -> None:
        """What the thread of rank 0 does with a checkpoint that is whole: its name, its copy, and which others stay."""
        assert self.folder is not None
        target, seconds = self.folder / retention.name_of(writing.step), time.monotonic() - writing.began
        if seconds > PROMISED_S and not self._told:
            self._told = True
            why = f"one on SIGTERM should take less than {PROMISED_S:g} s: give the job more time to end, or a faster disk"
            log.say(f"checkpoint of step {writing.step} took {seconds:.1f} s to write; {why}")
        if target.exists():
            retention.put_aside(target, "a newer one takes its place")
        writing.temporary.rename(target)
        storage.sync_folder(self.folder)
        if self.store:
            self.store.offer(target)
        spared = {target.name, *(self.store.busy_with() if self.store else ())}
        retention.prune(self.folder, self.keep, self.keep_best, spared)

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(self, like: Like | None = None) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """The newest checkpoint that is undamaged: its tree, and this rank's generators if it had them.

        Args:
            like: gives the tensor that each is read into, see `trainer.train.dcp.load_tensors`.

        Raises:
            ArtifactError: it is whole but cannot be read, which is no reason to take an older one.
            StorageError: the folder or the store cannot be read.
        """
        if self.folder is None:
            return None
        found, problem = None, None
        if self.ranks.rank == 0:
            try:
                with storage.explained(self.folder):
                    found = self._newest()
            except MillraceError as error:
                problem = error
        found = self._agreed(found, problem)[0]
        if found is None:
            return None
        loaded, problem = None, None
        try:
            loaded = self._read(self.folder / found, like)
        except MillraceError as error:
            problem = error
        self._agreed(None, problem)
        assert loaded is not None
        if self.ranks.rank == 0:
            log.say(f"resuming from checkpoint {found}")
        self._saved_step = loaded[2]
        self._last_end = time.monotonic()
        return loaded[:2]

    def _agreed(self, value: Any, problem: MillraceError | None) -> list[Any]:
        """The values of all ranks; an error of one is raised on every rank."""
        told = problem and (isinstance(problem, ArtifactError), problem.message, problem.hint)
        replies = self.ranks.gather((value, told))
        for _, found in replies:
            if found:
                raise (ArtifactError if found[0] else StorageError)(found[1], found[2])
        return [each for each, _ in replies]

    def _newest(self) -> str | None:
        """Name of the newest undamaged checkpoint, here or in the store, whence it is brought here."""
        assert self.folder is not None
        retention.sweep(self.folder)
        here = {place.name for place in retention.newest_first(self.folder)}
        there = self._stored(bool(here))
        for name in sorted(here | there, reverse=True):
            if name in here and self._is_good(self.folder / name):
                return name
            if name in there and self.store and self.store.fetch(name, self.folder):
                return name
        return None

    def _stored(self, others: bool) -> set[str]:
        if self.store is None:
            return set()
        try:
            return set(self.store.names())
        except StorageError as error:
            if not others:
                raise
            log.say(f"checkpoints: only those of this machine are looked at: {error.message}")
            return set()

    def _is_good(self, place: Path) -> bool:
        try:
            retention.check(place, self.identity)
        except manifest.OtherFormat:
            raise
        except ArtifactError as error:
            retention.put_aside(place, error.message)
            return False
        return True

    def _read(self, place: Path, like: Like | None) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
        """Tree, generators and step of a checkpoint whose digests were checked."""
        from trainer.train.dcp import empty, load_tensors, unreadable

        tensors = load_tensors(place, like or empty)
        try:
            with storage.explained(place):
                plain = json.loads((place / STATE).read_bytes())
                tree = join(plain["tree"], tensors)
                rng = place / f"rng-{self.ranks.rank:04d}.json"
                # Another number of ranks: the order of the data goes on, dropout starts anew.
                same = plain["ranks"] == self.ranks.size and rng.is_file()
                return tree, json.loads(rng.read_bytes()) if same else None, int(plain["step"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise unreadable(place, error) from error
