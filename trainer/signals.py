"""Signals that are handled for as long as something goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def caught(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    """Let `handler` have these signals inside; afterwards they are handled as before. For the main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
