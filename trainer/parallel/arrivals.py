"""How many collectives each local rank has come to, in a file that they map: it names the rank that the others wait for.

A collective that a rank does not come to fails on the others after `parallel.timeout_s`, with a message that does not
say who was missing. Counting costs a write to memory for each collective, and nothing has to be polled.
"""

from __future__ import annotations

import mmap
import signal
from pathlib import Path

from trainer.errors import MillraceError


class Unanswered(MillraceError):
    """A collective failed for want of a rank; `last` are the ranks that had come to fewer collectives than others."""

    # As if that rank had been killed, which torchrun does in the end: worth another try.
    exit_code = 128 + signal.SIGKILL

    def __init__(self, message: str, hint: str, last: list[int]) -> None:
        super().__init__(message, hint)
        self.last = last


class PeerLost(MillraceError):
    """The connection to another rank has ended: that rank, or its whole node, is gone."""

    exit_code = 128 + signal.SIGKILL


class Arrivals:
    """The counts, an int64 for each rank; each rank writes only its own.

    Args:
        path: the file, see `create`.
        rank: this rank.
        attempt: how often the ranks were restarted; counts of a later attempt are higher than all of an earlier one.
    """

    def __init__(self, path: Path, rank: int, attempt: int) -> None:
        with open(path, "r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self._rank = rank
        self._counts[rank] = attempt << 40

    def come(self) -> None:
        """This rank enters a collective."""
        self._counts[self._rank] += 1

    def last(self) -> list[int]:
        """The ranks with the lowest count; none if all are equal."""
        counts = self._counts.tolist()
        lowest = min(counts)
        return [rank for rank, count in enumerate(counts) if count == lowest] if lowest < max(counts) else []


def create(path: Path, size: int) -> None:
    """Write the file for a number of ranks."""
    path.write_bytes(bytes(8 * size))
