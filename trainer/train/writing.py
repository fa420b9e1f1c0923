"""A checkpoint that is being written in the background: one thread on each rank, and no collectives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import storage
from trainer.artifacts import manifest
from trainer.errors import MillraceError
from trainer.train.retention import KIND

if TYPE_CHECKING:
    from trainer.train.dcp import Share

POLL_S = 0.02


@dataclass
class Writing:
    """A save in flight on this rank.

    Attributes:
        step: of the state.
        temporary: folder that is written, the same on all ranks.
        share: what this rank writes.
        held: what this rank holds of the tensors; nobody changes it meanwhile.
        values: JSON values by the name of their file; nobody changes them meanwhile.
        files: other small files by name.
        meta, record: for the manifest.
        ranks: (rank, number of ranks).
        device: where the tensors are.
        complete: called on rank 0 when the folder is sealed.
    """

    step: int
    temporary: Path
    share: Share
    held: dict[str, Tensor]
    values: dict[str, Any]
    files: dict[str, bytes]
    meta: dict[str, Any]
    record: dict[str, Any]
    ranks: tuple[int, int]
    device: torch.device
    complete: Callable[[Writing], None]

    def __post_init__(self) -> None:
        # Message and hint of what went wrong.
        self.problem: tuple[str, str] | None = None
        self.began = time.monotonic()
        # Processor time that it took.
        self.cpu_s = 0.0
        self._share_done = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{self.step}", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def busy(self) -> bool:
        """Whether it is still at work."""
        return self._thread.is_alive()

    def wait_for_share(self) -> None:
        """Wait until this rank's own share is on the disk, or has failed."""
        self._share_done.wait()

    def end(self, seconds: float | None = None) -> None:
        """Wait until it is done, or for so long: then wait for no other rank any more."""
        self._thread.join(seconds)
        self._abandoned.set()

    def _run(self) -> None:
        rank, size = self.ranks
        try:
            with storage.explained(self.temporary):
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                part = self._write_share(rank)
                self._share_done.set()
                if rank == 0:
                    parts = [part, *(self._part_of(other) for other in range(1, size))]
                    if not self._abandoned.is_set():
                        self._seal(parts)
                        self.complete(self)
        except MillraceError as error:
            self.problem = (error.message, error.hint)
        except BaseException as error:  # it must reach the training thread, whatever it is
            self.problem = (f"{type(error).__name__}: {error}", "report this: it is a bug")
        finally:
            self.cpu_s = time.thread_time()
            self._share_done.set()

    def _write_share(self, rank: int) -> dict[str, Any]:
        """Write what this rank has to, durably; where it stands, and the digests of its files."""
        from trainer.train.dcp import write

        self.temporary.mkdir(parents=True, exist_ok=True)
        small = {**self.files, **{name: json.dumps(value).encode() for name, value in self.values.items()}}
        for name, content in small.items():
            (self.temporary / name).write_bytes(content)
        pieces = write(self.temporary, self.share, self.held)
        names = [*small, *{piece[4] for piece in pieces}]
        part = {"pieces": pieces, "sha256": {name: manifest.make_durable(self.temporary / name) for name in names}}
        if rank:
            storage.write_atomic(self.temporary / _part_name(rank), json.dumps(part).encode())
        return part

    def _part_of(self, rank: int) -> dict[str, Any]:
        """What another rank has written, once it has; nothing if it never will."""
        path = self.temporary / _part_name(rank)
        while not self._abandoned.is_set():
            if path.exists():
                part: dict[str, Any] = json.loads(path.read_bytes())
                path.unlink()
                return part
            time.sleep(POLL_S)
        return {}

    def _seal(self, parts: list[dict[str, Any]]) -> None:
        from trainer.train.dcp import finish

        finish(self.temporary, self.share, [part["pieces"] for part in parts])
        known = {name: sha256 for part in parts for name, sha256 in part["sha256"].items()}
        manifest.seal(self.temporary, KIND, self.meta, self.record, known=known)


def _part_name(rank: int) -> str:
    return f"part-{rank:04d}.json"
