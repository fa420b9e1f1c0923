"""SIGTERM: remembered while training, and acted on between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from trainer.errors import Preempted

Made = TypeVar("Made")


class Preemption:
    """While entered, SIGTERM sets `asked` instead of ending the process. Outside of the main thread it does nothing.

    A request that nobody inside has answered, with `Preempted` or `Interrupted`, is passed on to the handler before: an
    outer `Preemption` then is asked too.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._at_once = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self.asked and callable(self._before) and not isinstance(error, (Preempted, Interrupted)):
                self._before(signal.SIGTERM, None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._at_once:
            self._at_once = False
            raise Interrupted

    def until_asked(self, work: Callable[[], Made], *, at_once: bool = True) -> Made | None:
        """What `work` gives; None if SIGTERM came before or meanwhile, which leaves the work wherever it is.

        Args:
            work: what may be dropped at any place, such as compilation, which knows nothing of signals.
            at_once: leave it in the middle; otherwise where it polls.
        """
        try:
            self.poll()
            self._at_once = at_once
            return work()
        except Interrupted:
            return None
        except Exception:
            # The signal goes to compilers that run beside too, and their end is an error here.
            if not (self.asked and at_once):
                raise
            return None
        finally:
            self._at_once = False

    def poll(self) -> None:
        """Raise `Interrupted` if SIGTERM came: for the inside of an evaluation."""
        if self.asked:
            raise Interrupted


class Interrupted(BaseException):
    """Leaves an evaluation early. Not an `Exception`, so that nobody's `except Exception` swallows it."""
