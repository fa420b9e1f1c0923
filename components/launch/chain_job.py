"""The Job in which a run's coordinator works: small, restarted where it is lost, and the owner of all that the run makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from components.launch import batchjob, names, pods, rbac
from components.launch.chain import RUN_ENV, UNTIL_ENV
from components.launch.chain_plan import CONFIGURE
from components.launch.spec import PARAMS_ENV, stage
from components.table import TASKS, image
from trainer.config import Params

STAGE = "chain"
OWNER_ENV, OWNER_UID_ENV = "MILLRACE_OWNER", "MILLRACE_OWNER_UID"
# A node that is drained or lost takes the coordinator with it; each time, another pod goes on.
_RESTARTS = 20
_CPU, _MEMORY = "50m", "256Mi"
_GRACE_S = 10
# Kubernetes adds these to the Job that it is given, and refuses them in another one.
_OF_ONE_JOB = ("controller-uid", "job-name", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name")


def coordinator(params: Params, run: str, namespace: str = "", until: str = "") -> dict[str, Any]:
    """The coordinator's Job. Its configuration stands in it: it is there as long as the run is, and nobody can change it.

    Args:
        params: the configuration, as `chain_plan.settled` gives it: without secrets.
        run: name of the run.
        namespace: where it runs.
        until: the last stage; empty for all.
    """
    task = replace(TASKS[CONFIGURE], image="launcher")
    # It reads the store as the stages do, with their variables and secrets.
    as_a_stage = stage(params, CONFIGURE, name=job_name(run), namespace=namespace, args=(), run=run)
    spec = replace(
        as_a_stage,
        stage=STAGE,
        image=image(task, params),
        command=("python", "-m", "components.launch"),
        args=("chain", "--params", f"env:{PARAMS_ENV}"),
        env={**as_a_stage.env, RUN_ENV: run, UNTIL_ENV: until},
        cpu=_CPU,
        memory=_MEMORY,
        service_account=rbac.ACCOUNT,
        restarts=_RESTARTS,
        run_timeout_s=0.0,
        grace_s=_GRACE_S,
    )
    job = batchjob.job(spec)
    pod = job["spec"]["template"]["spec"]
    pod["automountServiceAccountToken"] = True
    pod["containers"][0]["env"] += owner_env()
    return job


def owner_env() -> list[dict[str, Any]]:
    """Variables by which a coordinator knows the Job that it is a pod of."""
    return [
        pods.from_label(OWNER_ENV, "batch.kubernetes.io/job-name"),
        pods.from_label(OWNER_UID_ENV, "batch.kubernetes.io/controller-uid"),
    ]


def owner(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The ownerReference to the coordinator's Job; None for one that runs elsewhere."""
    name, uid = environment.get(OWNER_ENV), environment.get(OWNER_UID_ENV)
    if not name or not uid:
        return None
    return {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}


def job_name(run: str) -> str:
    """Name of a run's first coordinator; a CronJob's run has the name of its Job."""
    return f"{names.MANAGER}-{run}"


def run_of(job: dict[str, Any]) -> str:
    """The run whose coordinator a Job is."""
    meta = job["metadata"]
    return str((meta.get("labels") or {}).get(names.RUN_LABEL) or meta["name"])


def again(job: dict[str, Any], name: str, until: str = "") -> dict[str, Any]:
    """A coordinator for the same run, from the Job of one that has ended.

    Args:
        job: the Job, as the API server has it.
        name: of the new one.
        until: the last stage this time; empty for all.
    """
    meta, spec, run = job["metadata"], copy.deepcopy(job["spec"]), run_of(job)
    for key in ("selector", "manualSelector", "suspend"):
        spec.pop(key, None)
    template = spec["template"]
    labels = template.setdefault("metadata", {}).setdefault("labels", {})
    for key in _OF_ONE_JOB:
        labels.pop(key, None)
    labels |= {names.JOB_LABEL: name, names.RUN_LABEL: run}
    container = template["spec"]["containers"][0]
    kept = [each for each in container.get("env", []) if each["name"] not in (RUN_ENV, UNTIL_ENV)]
    # First: arguments and other variables may refer to them.
    container["env"] = [{"name": RUN_ENV, "value": run}, {"name": UNTIL_ENV, "value": until}, *kept]
    labels_of_job = {key: value for key, value in (meta.get("labels") or {}).items() if key not in _OF_ONE_JOB}
    metadata = {"name": name, "namespace": meta["namespace"], "labels": {**labels_of_job, names.RUN_LABEL: run}}
    if meta.get("ownerReferences"):
        metadata["ownerReferences"] = meta["ownerReferences"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
