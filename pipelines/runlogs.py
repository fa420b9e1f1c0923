"""The logs of a run's tasks: `millrace logs`.

The API server hands out a pod's log by the pod's name (`/apis/v1alpha1/runs/RUN/nodes/POD/log`), the UI's server as well
(`/k8s/pod/logs`), but 2.15 to 2.17 tell ids of Argo nodes, not names of pods. A pod's name is the workflow's, the
template's and a hash of the node's name; all attempts of a retried task are children of one node. Once a pod is gone only
the object store has its log, as artifact `executor-logs`, which the API of these versions does not give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipelines.kfp_api import Api, Json, KfpError
from pipelines.runview import Task
from trainer.errors import EXIT_FAILURE, MillraceError

_TEMPLATE = "system-container-impl"
_ATTEMPTS = 11


class NoLog(MillraceError):
    """The server has no log of a task."""

    exit_code = EXIT_FAILURE


def read(api: Api, run: Json, spec: Json, task: Task) -> str:
    """The log of a task; of all its attempts, if it was retried.

    Raises:
        NoLog: none is to be had; the hint says where it may be.
    """
    for pods in _pods(spec, task):
        found = []
        for pod in pods:
            text = _log(api, run["run_id"], pod)
            if text is None:
                break
            found.append(text)
        if found:
            return (
                "".join(f"--- attempt {i + 1} ---\n{text}" for i, text in enumerate(found))
                if len(found) > 1
                else found[0]
            )
    raise NoLog(f"{task.name}: the server has no log of it ({task.state})", _elsewhere(api, run["run_id"]))


def _elsewhere(api: Api, run_id: str) -> str:
    namespace = api.target.namespace or "kubeflow"
    return (
        f"kubectl -n {namespace} logs -l pipeline/runid={run_id} -c main --prefix --tail=-1; once the pods are gone: "
        f"artifact executor-logs of the task, on {api.target.host}/#/runs/details/{run_id}"
    )


def _pods(spec: Json, task: Task) -> Iterator[list[str]]:
    """Names that a task's pods may have: lists of attempts, the likeliest first."""
    for node in task.nodes:
        workflow, _, number = node.rpartition("-")
        if not workflow:
            yield [node]
            continue
        # As the hash is of the whole name, one that fits shows that the name is right, and those of its attempts.
        name = ".".join([workflow, "root", *task.groups, task.name, "executor"])
        known = str(_fnv32a(name)) == number
        for prefix in _prefixes(spec, task.name):
            if known:
                yield [f"{workflow}-{prefix}retry-{_TEMPLATE}-{_fnv32a(f'{name}({i})')}" for i in range(_ATTEMPTS)]
            yield [f"{workflow}-{prefix}{_TEMPLATE}-{number}"]
            yield [f"{workflow}-{prefix}retry-{_TEMPLATE}-{number}"]
        yield [node]


def _prefixes(spec: Json, name: str) -> list[str]:
    """Templates of tasks with labels or annotations of their own are named after the numbers of these."""
    kubernetes: dict[str, Any] = ((spec.get("platform_spec") or {}).get("platforms") or {}).get("kubernetes") or {}
    executors = (kubernetes.get("deploymentSpec") or {}).get("executors") or {}
    meta = (executors.get(f"exec-{name}") or {}).get("podMetadata")
    return [f"metadata-{len(meta.get('annotations') or {})}-{len(meta.get('labels') or {})}-", ""] if meta else [""]


def _fnv32a(text: str) -> int:
    """The FNV-1a hash of 32 bits, by which Argo names nodes."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _log(api: Api, run_id: str, pod: str) -> str | None:
    """A pod's log; None if there is none. The server says so with status 200 and an error as JSON after the text."""
    query = {"podname": pod, "runid": run_id} | ({"podnamespace": api.target.namespace} if api.target.namespace else {})
    for path, words in ((f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", {}), ("/k8s/pod/logs", query)):
        try:
            text = api.text(path, **words)
        except KfpError as error:
            if error.status in (401, 403) or not error.status:
                raise
            continue
        text, error_json = _split_error(text)
        if not text.lstrip().lower().startswith(("<!doctype", "<html")) and (text or not error_json):
            return text
    return None


def _split_error(text: str) -> tuple[str, bool]:
    """The text before an error that the server appended, and whether there was one."""
    start = text.rfind('{"error_message":')
    if start < 0:
        return text, False
    try:
        json.loads(text[start:])
    except ValueError:
        return text, False
    return text[:start], True
