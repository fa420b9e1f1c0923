"""Runs on a Kubeflow Pipelines server: start, find, wait for and end them. The commands are in commands_kfp.py."""

from __future__ import annotations

import datetime as dt
import re
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from pipelines.kfp_api import Api, Json, KfpError, filter_
from pipelines.runview import FINAL, View, tasks
from trainer import __version__
from trainer.errors import EXIT_FAILURE, ConfigError, MillraceError, redact

POLL_S = 3.0
_TICK_S = 0.2
# A server that is being upgraded is waited for as long as this.
_SILENCE_S = 600.0
_SEARCHED = 2000
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class RunFailed(MillraceError):
    """A run that was waited for did not succeed."""

    exit_code = EXIT_FAILURE


def experiment(api: Api, *, create: bool = False) -> str:
    """The id of the target's experiment; empty if there is none and none is to be made.

    Raises:
        ConfigError: it is archived.
    """
    name, namespace = api.target.experiment, _namespace(api)

    def find() -> Json | None:
        found = api.pages("/experiments", "experiments", filter=filter_(display_name=name), **namespace)
        return next((each for each in found if each.get("display_name") == name), None)

    found = find()
    if found is None and create:
        try:
            found = api.create("/experiments", {"display_name": name, **namespace}, "experiment_id", find)
        except KfpError as error:
            # Someone else made it between the look and the request.
            found = find() if error.status == 409 else None
            if found is None:
                raise
    if found is None:
        return ""
    if create and found.get("storage_state") == "ARCHIVED":
        raise ConfigError(f"--experiment {name}: is archived", "restore it in the UI, or name another --experiment")
    return str(found["experiment_id"])


def pipeline_spec(documents: list[Json]) -> Json:
    """A package's documents as a request holds them."""
    return {"pipeline_spec": documents[0], "platform_spec": documents[1]} if len(documents) > 1 else documents[0]


def submit(api: Api, documents: list[Json], arguments: Json, name: str) -> Json:
    """Start a run, once, whatever happens to the connection.

    Args:
        api: the server.
        documents: the package: pipeline spec and, if it has one, platform spec.
        arguments: the pipeline's inputs.
        name: shown in the UI; need not be unique.

    Returns:
        The run, as the server has it.
    """
    key = uuid.uuid4().hex
    parent = experiment(api, create=True)
    body = {
        "display_name": name, "description": f"Submitted by millrace {__version__} (key {key}).", "experiment_id": parent,
        "pipeline_spec": pipeline_spec(documents), "runtime_config": {"parameters": arguments},
    }  # fmt: skip

    def find() -> Json | None:
        newest = api.get(
            "/runs", experiment_id=parent, sort_by="created_at desc", page_size=50, filter=filter_(display_name=name)
        )
        return next((run for run in newest.get("runs") or [] if f"(key {key})" in str(run.get("description"))), None)

    return api.create("/runs", body, "run_id", find)


def runs(api: Api, **equal: str) -> Iterator[Json]:
    """Runs of the target's experiment, the newest first; those whose fields equal what is given."""
    parent = experiment(api)
    if parent:
        query = {"filter": filter_(**equal)} if equal else {}
        yield from api.pages("/runs", "runs", experiment_id=parent, sort_by="created_at desc", **query)


def get(api: Api, run_id: str) -> Json:
    """A run, with the state of its tasks."""
    return api.get(f"/runs/{run_id}")


def resolve(api: Api, word: str) -> Json:
    """The run that a person means: an id, its unique beginning, a unique name, or `latest`.

    Raises:
        ConfigError: none or several.
    """
    if _UUID.fullmatch(word):
        return get(api, word)
    if word == "latest":
        newest = next(runs(api), None)
        if newest is None:
            raise ConfigError(f"no run in experiment {api.target.experiment}", "start one with `millrace submit`")
        return get(api, newest["run_id"])
    if not word or "/" in word:
        raise ConfigError(f"run {word!r}: is no id", "see `millrace runs`")
    known = list(islice(runs(api), _SEARCHED))
    found = [run for run in known if run.get("display_name") == word] or [
        run for run in known if run["run_id"].startswith(word)
    ]
    if len(found) != 1:
        which = ", ".join(f"{run['run_id'][:13]} ({run.get('display_name')})" for run in found[:5])
        what = f"several: {which}" if found else "none"
        raise ConfigError(
            f"run {word!r}: {what} in experiment {api.target.experiment}", "see `millrace runs`; `latest` is the newest"
        )
    return get(api, found[0]["run_id"])


def spec_of(api: Api, run: Json) -> Json:
    """The pipeline that a run runs; empty if the server no longer has it."""
    found = run.get("pipeline_spec")
    if not found and (reference := run.get("pipeline_version_reference")):
        path = f"/pipelines/{reference.get('pipeline_id')}/versions/{reference.get('pipeline_version_id')}"
        try:
            found = api.get(path).get("pipeline_spec")
        except KfpError as error:
            if error.status not in (403, 404):
                raise
    return found if isinstance(found, dict) else {}


def cancel(api: Api, run: Json) -> bool:
    """End a run; False if it had ended already. The server reports CANCELING and then FAILED."""
    if run.get("state") in FINAL:
        return False
    try:
        api.act("POST", f"/runs/{run['run_id']}:terminate")
    except KfpError:
        # It ended meanwhile, or the first of two requests worked.
        if get(api, run["run_id"]).get("state") in (*FINAL, "CANCELING"):
            return True
        raise
    return True


def wait(
    api: Api,
    run_id: str,
    spec: Json,
    view: View,
    timeout_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Json:
    """Show a run until it has ended; returns it.

    Raises:
        RunFailed: the time is up, and the run goes on; or the server cannot tell its state.
        KfpError: the server did not answer for ten minutes, or refuses.
    """
    started = heard = time.monotonic()
    while True:
        try:
            run = get(api, run_id)
            heard = time.monotonic()
            _require_state(run)
            view.show(tasks(spec, run, dt.datetime.now(dt.UTC)), str(run.get("state") or "PENDING"))
            if run.get("state") in FINAL:
                return run
        except KfpError as error:
            if (error.status and not error.transient) or time.monotonic() - heard > _SILENCE_S:
                raise
            view.note(f"{error.message}; trying again")
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise RunFailed(
                f"run {run_id}: not done after {timeout_s:.0f} s; it goes on", f"millrace status {run_id} --watch"
            )
        _pause(view, sleep)


def _require_state(run: Json) -> None:
    """Of a run that it cannot read any more the server tells the id and an error, for ever."""
    if run.get("error") and run.get("state", "RUNTIME_STATE_UNSPECIFIED") == "RUNTIME_STATE_UNSPECIFIED":
        said = redact(str(run["error"].get("message") or "no state"))
        raise RunFailed(
            f"run {run['run_id']}: the server cannot read it: {said}", "look at the logs of deploy/ml-pipeline"
        )


def _pause(view: View, sleep: Callable[[float], None]) -> None:
    until = time.monotonic() + POLL_S
    while view.live and time.monotonic() < until - _TICK_S:
        sleep(_TICK_S)
        view.tick()
    sleep(max(until - time.monotonic(), 0.0))


def url(api: Api, run_id: str) -> str:
    """The run's page."""
    return f"{api.target.host}/#/runs/details/{run_id}"


def _namespace(api: Api) -> dict[str, Any]:
    return {"namespace": api.target.namespace} if api.target.namespace else {}
