"""Copies of a run's checkpoints at a URI, for runs whose scratch folder does not outlive them.

    URI/train-4f0c…/step-000000100/{…, manifest.json}

The manifest comes last and goes first: a checkpoint without one is not there. Copying happens in a thread of its own
and never ends a run: what goes wrong is said.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from trainer import log, storage
from trainer.artifacts import manifest
from trainer.errors import ArtifactError, MillraceError
from trainer.registry_store import copy_tree
from trainer.train import retention


class Store:
    """The copies of one run.

    Args:
        uri: folder of this run, local or remote.
        identity: what the run is.
        keep: newest copies to keep.
        keep_best: keep the best one as well.
    """

    def __init__(self, uri: str, identity: str, keep: int, keep_best: bool) -> None:
        self.uri, self.identity, self.keep, self.keep_best = uri.rstrip("/"), identity, keep, keep_best
        self._lock = threading.Lock()
        self._wanted: Path | None = None
        self._copied: Path | None = None
        self._thread: threading.Thread | None = None

    # -- to the store -----------------------------------------------------------------------------------------------

    def offer(self, place: Path) -> None:
        """Copy a complete checkpoint in the background; one that waits for its turn makes way for a newer one."""
        with self._lock:
            self._wanted = place
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-store", daemon=True)
                self._thread.start()

    def busy_with(self) -> set[str]:
        """Names of the checkpoints that are being copied, or are about to be."""
        with self._lock:
            return {place.name for place in (self._wanted, self._copied) if place}

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all is copied, or for so long."""
        thread = self._thread
        if thread is None:
            return
        thread.join(seconds)
        if thread.is_alive():
            log.say(f"checkpoints: copying to {self.uri} is not done after {seconds:g} s")

    def _work(self) -> None:
        while True:
            with self._lock:
                self._copied, self._wanted = self._wanted, None
                if self._copied is None:
                    self._thread = None
                    return
                place = self._copied
            try:
                self.send(place)
                self.prune()
            except Exception as error:  # whatever drivers raise: training goes on without the copy
                reason = error.message if isinstance(error, MillraceError) else f"{type(error).__name__}: {error}"
                log.say(f"checkpoint {place.name} was not copied to {self.uri}: {reason}")

    def send(self, place: Path) -> None:
        """Copy a complete checkpoint.

        Raises:
            StorageError: it could not be copied.
        """
        if storage.is_remote(self.uri):
            storage.send(place, f"{self.uri}/{place.name}")
            return
        folder = storage.local_path(self.uri)
        temporary = folder / f"{retention.UNFINISHED}{place.name}-copy"
        storage.remove(temporary)
        copy_tree(place, temporary)
        with storage.explained(folder):
            if (folder / place.name).exists():
                retention.discard(folder / place.name)
            temporary.rename(folder / place.name)
            storage.sync_folder(folder)

    def prune(self) -> None:
        """Remove copies beyond the newest `keep` and the best."""
        if not storage.is_remote(self.uri):
            retention.prune(storage.local_path(self.uri), self.keep, self.keep_best)
            return
        fs, path = storage.filesystem(self.uri)
        names = self.names()
        best = next((name for name in names if self.keep_best and self._is_best(name)), "")
        with storage.explained(self.uri):
            for name in names[self.keep :]:
                if name != best:
                    fs.rm(f"{path}/{name}/{storage.MANIFEST}")
                    fs.rm(f"{path}/{name}", recursive=True)

    def _is_best(self, name: str) -> bool:
        place = f"{self.uri}/{name}"
        try:
            return retention.is_best(manifest.parse(storage.read_bytes(f"{place}/{storage.MANIFEST}"), place))
        except MillraceError:
            return False

    # -- from the store ---------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of the complete checkpoints, newest first.

        Raises:
            StorageError: the store cannot be read.
        """
        fs, path = storage.filesystem(self.uri)
        with storage.explained(self.uri):
            try:
                found: list[Any] = fs.glob(f"{path}/{retention.PREFIX}*/{storage.MANIFEST}")
            except FileNotFoundError:
                return []
        return sorted({str(each).rsplit("/", 2)[-2] for each in found}, reverse=True)

    def fetch(self, name: str, folder: Path) -> bool:
        """Bring a checkpoint to a local folder, under its name; False, and why is said, if it is damaged.

        Raises:
            StorageError: it cannot be read, or not be written here.
        """
        temporary = folder / f"{retention.UNFINISHED}{name}-fetched"
        storage.remove(temporary)
        with storage.explained(temporary):
            temporary.mkdir(parents=True)
        place = storage.fetch(f"{self.uri}/{name}", temporary)
        if not place.is_relative_to(temporary):
            copy_tree(place, temporary / name)
        try:
            retention.check(temporary / name, self.identity)
        except manifest.OtherFormat:
            raise
        except ArtifactError as error:
            log.say(f"checkpoint {self.uri}/{name} passed over: {error.message}")
            storage.remove(temporary)
            return False
        with storage.explained(folder):
            (temporary / name).rename(folder / name)
            storage.sync_folder(folder)
        storage.remove(temporary)
        log.say(f"checkpoint {name} was taken from {self.uri}")
        return True
