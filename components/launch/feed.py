"""What changes in the cluster, from several watches, one change after the other; and whether the API server is there."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Iterator
from typing import Any

from components.launch.api import Api
from components.launch.logs import Out
from components.launch.watch import Change, Mirror

# Seconds without an answer of the API server until we stop waiting; the job goes on, and can be attached to.
API_PATIENCE_S = 3600.0
# What was missed in an outage arrives within this time of its end; deadlines are not judged before.
_SETTLE_S = 2.0


class Feed:
    """Changes of several kinds of objects. A context manager.

    Args:
        api: the API server.
        asked: kinds, each with the selectors of `watch`.
        namespace: of the objects.
        out: told when the API server is away, and when it is back.
        name: of the job, for what is told.
    """

    def __init__(
        self, api: Api, asked: Iterable[tuple[str, dict[str, Any]]], namespace: str, out: Out, name: str
    ) -> None:
        self._changes: queue.Queue[Change] = queue.Queue()
        self._mirrors = [
            Mirror(api, kind, self._changes, namespace=namespace, patience_s=API_PATIENCE_S, **options)
            for kind, options in asked
        ]
        self._out, self._name = out, name
        self._quiet_until = 0.0

    def __enter__(self) -> Feed:
        for mirror in self._mirrors:
            mirror.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for mirror in self._mirrors:
            mirror.close()

    def take(self, within_s: float) -> Iterator[Change]:
        """All changes that are there, waiting for the first one so long.

        Raises:
            Exception: what ended a watch, an ApiError as a rule: what no patience mends.
        """
        try:
            change = self._changes.get(timeout=within_s)
            while True:
                if change.error:
                    raise change.error
                if change.type != "SYNCED":
                    yield change
                change = self._changes.get_nowait()
        except queue.Empty:
            return

    @property
    def current(self) -> bool:
        """Whether what was taken is all there is: every list is in, and the API server has not been away just now."""
        return all(mirror.synced.is_set() for mirror in self._mirrors) and not self._in_trouble()

    def _in_trouble(self) -> bool:
        trouble = next((mirror.trouble for mirror in self._mirrors if mirror.trouble), "")
        now = time.monotonic()
        if trouble:
            if not self._quiet_until:
                self._out(f"{self._name}: {trouble}; the job goes on, and so do we")
            self._quiet_until = now + _SETTLE_S
        elif self._quiet_until and now > self._quiet_until:
            self._quiet_until = 0.0
            self._out(f"{self._name}: the API server answers again")
        return bool(self._quiet_until)
