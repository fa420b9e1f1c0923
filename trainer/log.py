"""What a stage says: human lines or JSON objects on stdout, and a progress bar only on a terminal.

Rows of data and secrets are never passed to these functions.
"""

from __future__ import annotations

import json
import math
import sys
import time
from types import TracebackType
from typing import Any, Self

from trainer.errors import redact

_format = "text"


def configure(log_format: str) -> None:
    """Choose `text` (for people) or `json` (one object per line) for this process."""
    global _format
    _format = log_format


def is_json() -> bool:
    """Whether lines are JSON objects."""
    return _format == "json"


def say(message: str, **fields: Any) -> None:
    """Print one line; the fields follow as name=value (which Katib reads), or as keys of the JSON object."""
    if _format == "json":
        content = {"time": round(time.time(), 3), "message": message, **fields}
        line = json.dumps({name: _plain(value) for name, value in content.items()}, default=str)
    else:
        line = redact(" ".join([message, *(f"{name}={_show(value)}" for name, value in fields.items())]).strip())
    print(line, flush=True)


def _plain(value: Any) -> Any:
    """The value without secrets, NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return redact(value) if isinstance(value, str) else value


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Progress:
    """A bar on a terminal; elsewhere a line each tenth of the work, at most one every `pause` seconds."""

    def __init__(self, what: str, total: int, pause: float = 2.0) -> None:
        self.what, self.total, self.pause = what, total, pause
        self.done = 0
        self._start = self._last = time.monotonic()
        self._first = 0
        self._tenth = 0
        self._bar = sys.stdout.isatty() and _format == "text"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def resume(self, done: int) -> None:
        """Go on from `done`: the next update is said at once, and what is left is reckoned from here."""
        self.done = self._first = done
        self._start = time.monotonic()
        self._tenth = -1

    def left_s(self, done: int) -> float:
        """Seconds to the end, at the pace so far."""
        made = done - self._first
        return (time.monotonic() - self._start) / made * (self.total - done) if made > 0 else 0.0

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` is done; `note` follows it."""
        self.done = done
        now = time.monotonic()
        share = done / self.total if self.total else 0.0
        if self._bar:
            if now - self._last >= 0.1 or done >= self.total:
                self._last = now
                filled = int(24 * min(share, 1.0))
                bar = "█" * filled + "░" * (24 - filled)
                sys.stdout.write(
                    f"\r\033[K{self.what} {bar} {share:4.0%} {self.left_s(done):4.0f} s left  {note}"[:200]
                )
                sys.stdout.flush()
        elif int(share * 10) > self._tenth and (self._tenth < 0 or now - self._last >= self.pause):
            self._tenth, self._last = int(share * 10), now
            left = f", {self.left_s(done):.0f} s left" if done < self.total else ""
            say(f"{self.what} {done}/{self.total} {note}".strip() + left)
