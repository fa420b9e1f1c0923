"""What pods print: rank 0's lines as they come, each once, and the last lines of pods that failed."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from components.launch.api import Api, ApiError, Backoff, Stop

Out = Callable[[str], None]

TAIL = 20
# Enough to hold the whole of an error behind the traceback of another rank.
_SEARCHED = 200
_TAIL_WITHIN_S = 3.0
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d) ?")


def say(line: str) -> None:
    """Print a line in one piece: `print` writes the line and its end apart, and several threads print here."""
    print(f"{line}\n", end="", flush=True)


class Once:
    """Lets each line of a log through once, though it is read again from a second before where it broke off.

    The server takes the time to go on from in whole seconds, so up to a second of lines comes twice. How many lines of
    that second were there, by their own time (in nanoseconds), tells what is new; their order does not: standard output
    and standard error are stamped by two writers, and come a little out of order.
    """

    def __init__(self) -> None:
        self.since = ""
        """The time to go on from, for the server; empty at the beginning."""
        self._seen: Counter[str] = Counter()
        self._again: Counter[str] = Counter()
        self._from = ""
        self._emit = True

    def begin(self) -> None:
        """The log is being read again, from `since`."""
        self._from, self._again, self._emit = self.since, self._seen.copy(), True

    def line(self, line: str) -> str | None:
        """The line without its time; None if it was there before."""
        found = _STAMP.match(line)
        if not found:  # a further piece of a long line
            return line if self._emit else None
        second, stamp = f"{found[1]}{found[3]}", found[0].rstrip()
        self._emit = second >= self._from and not self._again[stamp]
        if self._emit:
            if second > self.since:
                self.since = second
                self._seen.clear()
            if second == self.since:
                self._seen[stamp] += 1
        elif self._again[stamp]:
            self._again[stamp] -= 1
        return line[found.end() :] if self._emit else None


class Follower(threading.Thread):
    """Reads the log of one pod until it has ended, however often the connection breaks or its container restarts.

    Args:
        api: the API server.
        pod: name of the pod.
        container: name of its container.
        out: takes each line.
        namespace: of the pod.
        before: the follower of the pod in whose place this one came: its lines come first.
    """

    def __init__(
        self, api: Api, pod: str, container: str, out: Out, namespace: str = "", before: Follower | None = None
    ) -> None:
        super().__init__(name=f"log-{pod}", daemon=True)
        self._api, self._pod, self._container, self._out, self._before = api, pod, container, out, before
        self._namespace = namespace
        self._halt, self._ended, self._again = Stop(), threading.Event(), threading.Event()
        self._once = Once()

    def restarted(self) -> None:
        """Tell that the container was started again: what its predecessor printed last may not have been read."""
        self._again.set()

    def finish(self) -> None:
        """Tell that the pod has ended: what it printed is read to its end, and no more is waited for."""
        self._ended.set()

    def close(self, within_s: float = 10.0) -> None:
        """Read what there still is, for so long, and end."""
        self.finish()
        self.join(within_s)
        self._halt.set()

    def abandon(self) -> None:
        """End at once."""
        self._halt.set()

    def run(self) -> None:
        """Follow; the body of the thread."""
        if self._before:
            self._before.close()
        backoff = Backoff()
        while not self._halt.is_set():
            last_round = self._ended.is_set()
            try:
                if self._again.is_set():
                    self._again.clear()
                    self._read(follow=False, previous=True)
                if self._read(follow=not last_round) and not last_round:
                    backoff.reset()
                if last_round:
                    return
            except ApiError as error:
                if error.status == 404 or (last_round and not self._api.transient(error)):
                    return
            # The stream ends with the container, with a restart of the API server, and for logs that were rotated.
            self._ended.wait(backoff.pause())

    def _read(self, *, follow: bool, previous: bool = False) -> int:
        """Print the lines that were not printed before; returns their number."""
        self._once.begin()
        printed = 0
        lines = self._api.log(
            self._pod, self._container, follow=follow, since_time=self._once.since, timestamps=True, previous=previous,
            stop=self._halt, namespace=self._namespace,
        )  # fmt: skip
        for line in lines:
            text = self._once.line(line)
            if text is not None:
                printed += 1
                self._out(text)
        return printed


def ending(api: Api, pod: str, container: str, restarted: bool, namespace: str = "") -> list[str]:
    """The last lines of a container that failed, of its predecessor if it has been started again since; none if gone."""
    for previous in (True, False) if restarted else (False,):
        try:
            lines = api.log(
                pod, container, tail=_SEARCHED, previous=previous, namespace=namespace, within_s=_TAIL_WITHIN_S
            )
            if found := list(lines):
                return found
        except ApiError:
            continue
    return []


@dataclass(frozen=True)
class Told:
    """The error that a stage printed when it ended: message and hint."""

    message: str
    hint: str


def trainer_error(lines: Sequence[str]) -> Told | None:
    """The last error that a stage printed (`error: MESSAGE`, `  fix: HINT`, or one JSON object), if there is one."""
    for start in range(len(lines) - 1, -1, -1):
        line = lines[start]
        if line.startswith("error: "):
            return _told(lines[start:])
        if line.startswith("{") and '"error"' in line:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and found.get("message") == "error":
                return Told(str(found.get("error") or ""), str(found.get("fix") or ""))
    return None


def _told(lines: Sequence[str]) -> Told:
    """An error's message may have several lines, of which those after the first are indented, as is the hint."""
    message = [lines[0].removeprefix("error: ")]
    for line in lines[1:]:
        if line.startswith("  fix: "):
            return Told("\n".join(message), line.removeprefix("  fix: "))
        if not line.startswith("  "):
            break
        message.append(line)
    return Told("\n".join(message), "")


def shown(rank: str, lines: Iterable[str]) -> list[str]:
    """Lines of a pod, each with its rank before it."""
    return [f"{rank} | {line}" for line in lines]
