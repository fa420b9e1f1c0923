"""Ranks that are threads of one process: enough for what ranks agree on and share a folder for, and quick to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from trainer.parallel.group import Ranks

DEADLINE = 60.0


class Threads(Ranks):
    """One of several ranks; `together` makes them."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, by rank, on every rank."""
        self._table[self.rank] = value
        self._barrier.wait(DEADLINE)
        found = list(self._table)
        self._barrier.wait(DEADLINE)
        return found

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        return self.gather(value)[0]


def together(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What `work(ranks)` gives, or the error that it raises, on each of `size` ranks."""
    table: list[Any] = [None] * size
    results: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, size, table, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a rank hangs"
    return results
