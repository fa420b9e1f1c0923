"""What Argo makes of a pipeline: the nodes that Kubeflow Pipelines 2.17 lists as a run's `task_details`."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

Json = dict[str, Any]
EPOCH = "1970-01-01T00:00:00Z"
WORKFLOW = "millrace-x7k2p"


def fnv(text: str) -> int:
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) % 2**32
    return value


def nodes(run: Json, states: dict[str, str]) -> list[Json]:
    """The `task_details` of a run whose tasks (or groups) are in these states: done, cached, running, failed, skipped."""
    spec = run["pipeline_spec"].get("pipeline_spec", run["pipeline_spec"])
    where = dict(_places(spec, spec["root"], ""))
    begun = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(hours=1)
    details = [_node(run, WORKFLOW, "RUNNING", begun, None), _node(run, "root-driver", "SUCCEEDED", begun, begun)]
    for i, (name, state) in enumerate(states.items()):
        start = begun + dt.timedelta(minutes=i)
        end = (
            None
            if state == "running"
            else start + dt.timedelta(seconds=0 if state == "skipped" else 1 if state == "cached" else 42)
        )
        phase = {
            "done": "SUCCEEDED",
            "cached": "SUCCEEDED",
            "running": "RUNNING",
            "failed": "FAILED",
            "skipped": "SKIPPED",
        }[state]
        if state != "skipped":
            details.append(
                _node(
                    run,
                    f"{name}-driver",
                    "SUCCEEDED",
                    start - dt.timedelta(seconds=20),
                    start - dt.timedelta(seconds=2),
                )
            )
        place = where.get(name, "")
        pod = f"{WORKFLOW}-{fnv(f'{WORKFLOW}.root{place}.{name}.executor')}"
        details.append(
            _node(run, name, phase, start, end) | ({} if state == "skipped" else {"child_tasks": [{"pod_name": pod}]})
        )
        if state != "skipped":
            skipped = state == "cached"
            details.append(_node(run, "executor", "SKIPPED" if skipped else phase, start, start if skipped else end))
    return details[::-1]


def _places(spec: Json, component: Json, path: str) -> list[tuple[str, str]]:
    found = []
    for name, task in component["dag"]["tasks"].items():
        found.append((name, path))
        inner = spec["components"][task["componentRef"]["name"]]
        if "dag" in inner:
            found += _places(spec, inner, f"{path}.{name}")
    return found


def _node(run: Json, name: str, state: str, begun: dt.datetime, ended: dt.datetime | None) -> Json:
    def when(time: dt.datetime | None) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ") if time else EPOCH

    return {"run_id": run["run_id"], "task_id": str(uuid.uuid4()), "display_name": name, "create_time": when(begun),
            "start_time": when(begun), "end_time": when(ended), "state": state}  # fmt: skip


def pod_of(task: str, groups: str = "", attempt: int | None = None) -> str:
    """The name of a task's pod; `groups` is its place, such as `.exit-handler-1`."""
    node = f"{WORKFLOW}.root{groups}.{task}.executor"
    if attempt is None:
        return f"{WORKFLOW}-system-container-impl-{fnv(node)}"
    return f"{WORKFLOW}-retry-system-container-impl-{fnv(f'{node}({attempt})')}"
