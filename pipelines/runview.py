"""A run's tasks as lines: what each is doing, live on a terminal, a line for each change in a pipe.

The server tells of Argo's nodes, not of the pipeline's tasks: a task `train` has a node `train-driver`, then a node
`train` and in it one named `executor`, which is skipped when the result came from the cache.
"""

from __future__ import annotations

import datetime as dt
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from pipelines.screen import SPINNER, Paint, is_live, seconds

Json = dict[str, Any]
_NAMES = 14
MARKS = {
    "done": ("✓", "green"), "cached": ("✓", "green"), "failed": ("✗", "red"), "stopped": ("✗", "yellow"),
    "skipped": ("·", "dim"), "not reached": ("·", "dim"), "waiting": ("·", "dim"),
}  # fmt: skip
MOVING = ("starting", "running")
FINAL = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


@dataclass(frozen=True)
class Leaf:
    """A container task of a pipeline: its name, and the names of the groups around it from the outside in."""

    name: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What a task is doing.

    Attributes:
        name: as in the pipeline.
        state: a key of `MARKS` or one of `MOVING`.
        took: seconds so far, or in all; None if it has not begun.
        nodes: ids of the Argo nodes that ran it.
        groups: as `Leaf.groups`.
    """

    name: str
    state: str
    took: float | None = None
    nodes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


def unwrapped(spec: Json) -> Json:
    """The pipeline spec itself, out of the pair with the platform spec that the server keeps."""
    inner = spec.get("pipeline_spec", spec)
    return inner if isinstance(inner, dict) else {}


def leaves(spec: Json) -> list[Leaf]:
    """The container tasks of a pipeline, in an order in which they can run."""
    inner = unwrapped(spec)
    return list(_leaves(inner.get("root") or {}, inner.get("components") or {}, ()))


def _leaves(component: Json, components: Json, groups: tuple[str, ...]) -> Iterator[Leaf]:
    for name, task in _in_order((component.get("dag") or {}).get("tasks") or {}):
        inner = components.get(str((task.get("componentRef") or {}).get("name")), {})
        if "dag" in inner:
            yield from _leaves(inner, components, (*groups, name))
        else:
            yield Leaf(name, groups)


def _in_order(found: Mapping[str, Json]) -> list[tuple[str, Json]]:
    """Tasks after those they depend on; a cycle or an unknown name ends the wait for it."""
    left, ordered = dict(sorted(found.items())), []
    while left:
        ready = [
            name for name, task in left.items() if not set(task.get("dependentTasks") or []) & (left.keys() - {name})
        ]
        for name in ready or list(left):
            ordered.append((name, left.pop(name)))
    return ordered


def tasks(spec: Json, run: Json, now: dt.datetime) -> list[Task]:
    """The state of each task of a run."""
    details = list((run.get("run_details") or {}).get("task_details") or [])
    nodes: dict[str, Json] = {}
    for detail in sorted(details, key=lambda each: str(each.get("start_time") or "")):
        nodes[str(detail.get("display_name") or "")] = detail
    over = run.get("state") in FINAL
    executors = [each for each in details if each.get("display_name") == "executor"]
    return [_task(leaf, nodes, executors, over, now) for leaf in leaves(spec) or _unknown(nodes)]


def _unknown(nodes: Mapping[str, Json]) -> list[Leaf]:
    """Tasks, by their drivers, where the server has no pipeline to tell them from."""
    named = [name.removesuffix("-driver") for name in nodes if name.endswith("-driver") and name != "root-driver"]
    return [Leaf(name) for name in named if name in nodes]


def _task(leaf: Leaf, nodes: Mapping[str, Json], executors: list[Json], over: bool, now: dt.datetime) -> Task:
    node, driver = nodes.get(leaf.name), nodes.get(f"{leaf.name}-driver")
    shown = node or driver
    if shown is None:
        around = {(nodes.get(group) or {}).get("state") for group in leaf.groups}
        state = "skipped" if "SKIPPED" in around else "not reached" if over else "waiting"
        return Task(leaf.name, state, groups=leaf.groups)
    state = _state(str(shown.get("state") or ""), over, node is None)
    if state == "done" and _cached(shown, executors):
        state = "cached"
    children = (
        tuple(str(child["pod_name"]) for child in shown.get("child_tasks") or [] if child.get("pod_name"))
        if node
        else ()
    )
    begun, ended = time_of(shown.get("start_time")), time_of(shown.get("end_time"))
    took = None if begun is None or state in ("skipped", "not reached") else ((ended or now) - begun).total_seconds()
    return Task(leaf.name, state, took if took is None else max(took, 0.0), children, leaf.groups)


def _state(state: str, over: bool, only_driver: bool) -> str:
    if state in ("FAILED", "ERROR"):
        return "failed"
    if state == "SKIPPED":
        return "skipped"
    if state == "CACHED":
        return "cached"
    if state in ("CANCELED", "CANCELING") or (over and state in ("RUNNING", "PENDING")):
        return "stopped"
    if only_driver:
        return "not reached" if over else "starting"
    if state == "SUCCEEDED":
        return "done"
    # Argo's "Omitted", for tasks behind one that failed, has no name in this API.
    return "running" if state in ("RUNNING", "PENDING", "PAUSED") else "not reached"


def _cached(node: Json, executors: list[Json]) -> bool:
    """Whether the executor of a task was skipped: the one that began while the task's node was there."""
    begun, ended = time_of(node.get("start_time")), time_of(node.get("end_time"))
    if begun is None or ended is None:
        return False
    states = {
        each.get("state")
        for each in executors
        for start in [time_of(each.get("start_time"))]
        if start and begun <= start <= ended
    }
    return states == {"SKIPPED"}


def time_of(text: Any) -> dt.datetime | None:
    """A time of the API; None for what has not happened, which it writes as 1970."""
    try:
        found = dt.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.year > 1970 and found.tzinfo else None


def failed(found: list[Task]) -> list[str]:
    """The names of the tasks that failed."""
    return [task.name for task in found if task.state == "failed"]


def line(task: Task, paint: Paint, frame: int = 0) -> str:
    """A task's line: mark, name, duration, state."""
    mark, style = MARKS.get(task.state, (SPINNER[frame % len(SPINNER)] if paint.on else "•", "cyan"))
    took = seconds(task.took) if task.took is not None else ""
    note = "" if task.state == "done" else task.state
    return f"  {paint(mark, style)} {task.name:<{_NAMES}} {took:>8}  {paint(note, 'dim')}".rstrip()


class View:
    """The tasks of one run on a stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = is_live(self.stream)
        self.paint = Paint(self.stream)
        self._tasks: list[Task] = []
        self._since = time.monotonic()
        self._state, self._note, self._frame, self._drawn = "", "", 0, 0

    def show(self, found: list[Task], state: str) -> None:
        """New facts from the server."""
        before = {task.name: task.state for task in self._tasks}
        changed = [task for task in found if task.state != before.get(task.name, "waiting")]
        new_state, self._state = state != self._state, state
        self._tasks, self._since, self._note = found, time.monotonic(), ""
        if self.live:
            self._draw()
            return
        if new_state and state not in FINAL:
            self._write(f"run: {state}\n")
        for task in changed:
            took = f" ({seconds(task.took)})" if task.took is not None and task.state not in MOVING else ""
            self._write(f"{task.name}: {task.state}{took}\n")

    def note(self, text: str) -> None:
        """What keeps the server's facts from coming; said once."""
        if not self.live and text != self._note:
            self._write(f"{text}\n")
        self._note = text
        self.tick()

    def tick(self) -> None:
        """Time passed."""
        if self.live:
            self._draw()

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            self._write("\x1b[?25h")

    def _draw(self) -> None:
        self._frame += 1
        late = time.monotonic() - self._since
        lines = []
        for task in self._tasks:
            took = task.took + late if task.took is not None and task.state in MOVING else task.took
            lines.append(line(Task(task.name, task.state, took), self.paint, self._frame))
        size = shutil.get_terminal_size()
        if self._state not in FINAL:  # how it has ended is said by whoever waited for it
            summary = f"run {self._state}" + (f": {self._note}" if self._note else "")
            lines.append(f"  {self.paint(summary[: size.columns - 4], 'dim')}")
        # A screen that is too low shows the end: lines that have scrolled away cannot be drawn again.
        lines = lines[-max(size.lines - 1, 3) :]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._write("\x1b[?25l" + up + "".join(f"\r\x1b[K{text}\n" for text in lines) + "\x1b[J")
        self._drawn = len(lines)

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
