"""The runs of a namespace: each is the Job of its coordinator, which owns all that the run has made there."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Any

from components.launch import chain_job, names, observe, rbac
from components.launch.api import Api, ApiError
from trainer.config import Params
from trainer.config.names import nearest
from trainer.errors import ConfigError, MillraceError

Json = dict[str, Any]
# What a person sees fail is known to the cluster as failed some seconds later.
_ENDING_S = 10.0
_INSTALL = "`millrace doctor --cluster --namespace {0}` says how an administrator makes it; or name another --namespace"


def start(api: Api, params: Params, until: str = "") -> Json:
    """Make the coordinator's Job of a new run; returns the Job.

    Raises:
        MillraceError: there is no such namespace, or it has no account for the run.
        ConfigError: the claim is not there.
        ApiError: the cluster refuses the Job.
    """
    hint = _INSTALL.format(api.namespace)
    _require(api, "Namespace", api.namespace, MillraceError(f"namespace {api.namespace}: is not in the cluster", hint))
    account = MillraceError(f"namespace {api.namespace}: has no service account {rbac.ACCOUNT}", hint)
    _require(api, "ServiceAccount", rbac.ACCOUNT, account)
    if params.cluster.claim:
        message = f"cluster.claim: namespace {api.namespace} has no PersistentVolumeClaim {params.cluster.claim}"
        hint = "make it, of access mode ReadWriteMany, or name another one: `kubectl get pvc`"
        _require(api, "PersistentVolumeClaim", params.cluster.claim, ConfigError(message, hint))
    run = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return api.create(chain_job.coordinator(params, run, api.namespace, until))


def _require(api: Api, kind: str, name: str, missing: MillraceError) -> None:
    try:
        api.get(kind, name)
    except ApiError as error:
        if error.status == 404:
            raise missing from None
        if error.status != 403:  # whoever may not look at it may still use it
            raise


def find(api: Api, run: str = "") -> Json:
    """The coordinator's Job of a run, the newest one of it; without a name, of the newest run.

    Raises:
        ConfigError: there is no such run.
    """
    found = [job for job in coordinators(api) if run in ("", chain_job.run_of(job), job["metadata"]["name"])]
    if found:
        return found[-1]
    known = [chain_job.run_of(job) for job in coordinators(api)]
    if not run:
        raise ConfigError(f"no runs in namespace {api.namespace}", "start one: millrace run --engine kubernetes")
    raise ConfigError(
        f"run {run}: not in namespace {api.namespace}; {nearest(run, known)}", "correct the name, or --namespace"
    )


def coordinators(api: Api) -> list[Json]:
    """The Jobs of all coordinators, the oldest first."""
    labels = names.labels(chain_job.STAGE)
    selector = ",".join(f"{key}={labels[key]}" for key in sorted(labels))
    return sorted(api.list("Job", label_selector=selector), key=lambda job: str(job["metadata"]["creationTimestamp"]))


def state(job: Json) -> str:
    """How a run stands: running, done or failed."""
    return {"succeeded": "done", "failed": "failed"}.get(observe.condition(job)[0], "running")


def resume(api: Api, job: Json, until: str = "") -> Json:
    """Go on with a run that has ended; returns the Job of its new coordinator.

    It removes jobs that failed and starts them again. The Job of the one before stays until its time is over: it holds
    the configuration, without which nobody could go on.

    Raises:
        MillraceError: it has not ended.
    """
    run, deadline = chain_job.run_of(job), time.monotonic() + _ENDING_S
    while state(job) == "running" and time.monotonic() < deadline:
        time.sleep(1.0)
        job = api.get("Job", job["metadata"]["name"])
    if state(job) == "running":
        raise MillraceError(f"run {run}: has not ended", f"follow it: millrace run --engine kubernetes --attach {run}")
    return api.create(chain_job.again(job, _next_name(api, run), until))


def _next_name(api: Api, run: str) -> str:
    taken = {job["metadata"]["name"] for job in coordinators(api)}
    first = chain_job.job_name(run)
    return next(name for number in range(2, 10_000) if (name := f"{first}-{number}") not in taken)


def cancel(api: Api, run: str) -> None:
    """Remove a run from the cluster: its coordinators, and with them all jobs and pods. What it stored stays."""
    for job in coordinators(api):
        if chain_job.run_of(job) == run:
            api.delete("Job", job["metadata"]["name"])
