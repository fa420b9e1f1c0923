"""Follow the objects of a kind: list, then watch, over lost connections, restarts of the API server and expired versions.

Nothing is lost and nothing said twice: a connection that ends goes on at the version last seen, and where the server no
longer knows that version, the difference to a new list is told instead.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from components.launch import kinds
from components.launch.api import Api, ApiError, Backoff, Object, Stop, slim

# The server ends a watch by itself after 30 to 60 minutes; asked to do so earlier, it shows that it is alive.
_WATCH_S = 290
# Its own pauses, and the network's, on top of that.
_SILENCE_S = 20.0
# A connection that lasted so long was none of a series that fails.
_STEADY_S = 10.0


@dataclass(frozen=True)
class Change:
    """What a Mirror puts into its queue: `type` is ADDED, MODIFIED, DELETED, SYNCED (a whole list is in) or ERROR (the end)."""

    kind: str
    type: str
    object: Object = field(default_factory=dict)
    error: Exception | None = None


def watch(api: Api, kind: str, *, label_selector: str = "", field_selector: str = "", namespace: str = "",
          stop: threading.Event, patience_s: float | None = None,
          on_trouble: Callable[[str], None] | None = None) -> Iterator[tuple[str, Object]]:  # fmt: skip
    """Yield (type, object) for all objects there are and for each later change, until `stop` is set.

    Args:
        api: the API server.
        kind: of `kinds.KINDS`.
        label_selector: as kubectl takes it.
        field_selector: likewise, such as involvedObject.name=NAME.
        namespace: else that of the login.
        stop: ends it; at once if it is an `api.Stop`, else with the next event or connection.
        patience_s: seconds without an answer of the API server until it is given up; None waits until `stop`.
        on_trouble: told of each lost connection, and "" when it is back.

    Yields:
        ADDED, MODIFIED or DELETED with the object (for DELETED as it was last), and SYNCED with an empty one after each
        complete list: what has not been named by then does not exist.

    Raises:
        ApiError: what no patience mends (no right, no such kind), or patience ran out.
    """
    state = _State(api, kind, label_selector, field_selector, namespace or api.namespace)
    backoff, answered, lost = Backoff(), time.monotonic(), False
    while not stop.is_set():
        began, problem = time.monotonic(), None
        try:
            for event in state.follow(stop):
                answered = time.monotonic()
                if lost and on_trouble:
                    on_trouble("")
                lost = False
                if event[0] != "BOOKMARK":
                    yield event
            answered = time.monotonic()
        except ApiError as error:
            if not api.transient(error) or (patience_s is not None and time.monotonic() - answered > patience_s):
                raise
            if on_trouble and not lost:
                on_trouble(error.message)
            lost, problem = True, error
        # A server that takes the connection and drops it at once, again and again, is not asked without pause.
        if time.monotonic() - began > _STEADY_S:
            backoff.reset()
        stop.wait(backoff.pause(problem))


class _State:
    """What a watch knows: every object by name, and the version from which it goes on."""

    def __init__(self, api: Api, kind: str, label_selector: str, field_selector: str, namespace: str) -> None:
        self.api = api
        self.kind = kind
        self.namespace = namespace
        self.selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
        self.known: dict[str, Object] = {}
        self.version = ""

    def follow(self, stop: threading.Event) -> Iterator[tuple[str, Object]]:
        """The changes of one connection, after a list where no version is known.

        Raises:
            ApiError: the connection could not be made, or broke.
        """
        if not self.version:
            yield from self._relist()
        seconds = int(_WATCH_S * random.uniform(0.8, 1.0))  # noqa: S311
        asked = {
            **self.selectors, "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": self.version,
            "timeoutSeconds": str(seconds),
        }  # fmt: skip
        address = kinds.path(self.kind, self.namespace)
        try:
            with self.api.stream(address, asked, stop=stop, read_s=seconds + _SILENCE_S) as stream:
                yield "BOOKMARK", {}  # the server is there, though it may say nothing for long
                for line in stream.lines():
                    # A line without its end was cut: the next connection gets all of it.
                    if line.endswith(b"\n") and line.strip():
                        yield self._take(line)
        except ApiError as error:
            if error.status != 410:
                raise
            self.version = ""

    def _relist(self) -> Iterator[tuple[str, Object]]:
        try:
            items, version = self.api.listing(
                self.kind, label_selector=self.selectors["labelSelector"],
                field_selector=self.selectors["fieldSelector"], namespace=self.namespace, within_s=0.0,
            )  # fmt: skip
        except ApiError as error:
            if error.status == 410:  # the list changed too much between two of its pages
                raise ApiError(503, error.reason, error.message) from None
            raise
        found = {item["metadata"]["name"]: item for item in items}
        for name, old in list(self.known.items()):
            if name not in found or _of(found[name], "uid") != _of(old, "uid"):
                del self.known[name]
                yield "DELETED", old
        for name, item in found.items():
            before = self.known.get(name)
            self.known[name] = item
            if before is None or _of(before, "resourceVersion") != _of(item, "resourceVersion"):
                yield "ADDED" if before is None else "MODIFIED", item
        self.version = version
        yield "SYNCED", {}

    def _take(self, line: bytes) -> tuple[str, Object]:
        try:
            event = json.loads(line)
            change, item = event["type"], slim(event["object"])
            if change == "ERROR":
                raise ApiError(int(item.get("code") or 0), str(item.get("reason", "")), str(item.get("message", "")))
            version, name = item["metadata"]["resourceVersion"], item["metadata"].get("name", "")
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
            raise ApiError(0, "BadAnswer", f"the watch of {self.kind} sent what is no event") from None
        self.version = version
        if change == "BOOKMARK":
            return change, item
        if change == "DELETED":
            self.known.pop(name, None)
            return change, item
        change = "MODIFIED" if name in self.known else "ADDED"
        self.known[name] = item
        return change, item


def _of(item: Object, name: str) -> Any:
    return item["metadata"].get(name)


class Mirror:
    """The objects of a kind as they are now, kept by a thread; changes also go to a queue. A context manager.

    Args:
        api: the API server.
        kind: of `kinds.KINDS`.
        changes: gets a `Change` for each event; several mirrors may share one.
        options: of `watch`: label_selector, field_selector, namespace, patience_s.
    """

    def __init__(self, api: Api, kind: str, changes: queue.Queue[Change] | None = None, **options: Any) -> None:
        self.kind = kind
        self.objects: dict[str, Object] = {}
        self.synced = threading.Event()
        self.error: Exception | None = None
        self.trouble = ""
        self._api, self._changes, self._options = api, changes, options
        self._stop = Stop()
        self._thread = threading.Thread(target=self._run, name=f"watch-{kind}", daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch and its thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        try:
            for change, item in watch(self._api, self.kind, stop=self._stop, on_trouble=self._say, **self._options):
                if change == "SYNCED":
                    self.synced.set()
                else:
                    # A new dict, so that whoever goes through the old one is not disturbed.
                    rest = {name: held for name, held in self.objects.items() if name != item["metadata"]["name"]}
                    self.objects = rest if change == "DELETED" else {**rest, item["metadata"]["name"]: item}
                self._put(Change(self.kind, change, item))
        except (
            Exception
        ) as error:  # whoever takes the changes raises it: a thread that ends in silence is waited for for ever
            self.error = error
            self._put(Change(self.kind, "ERROR", error=error))

    def _say(self, trouble: str) -> None:
        self.trouble = trouble

    def _put(self, change: Change) -> None:
        if self._changes is not None:
            self._changes.put(change)
