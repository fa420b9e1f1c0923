"""How the coordinator runs a step: as the job that cluster.job asks for, else as a Job of one pod."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from components.launch import batchjob, chain_job, chain_plan, launcher, names, pytorchjob, spec, trainjob
from components.launch.api import Api, Object
from components.launch.chain import Start
from components.launch.chain_plan import Step
from components.launch.spec import JobSpec
from trainer.config import Params


def starter(params: Params, run: str) -> Start:
    """What runs a step of a run in the cluster that this process works in.

    Args:
        params: the configuration.
        run: name of the run.
    """
    api, owner = Api.connect(), chain_job.owner(os.environ)

    def start(step: Step, hear: Callable[[str], None]) -> None:
        asked, manifest = rendered(params, run, step, api.namespace, owner)
        # A coordinator that is stopped leaves its job: its next pod attaches to it, and whoever removes the coordinator's
        # Job removes what it owns.
        launcher.run(api, asked, manifest, out=hear, detach=True).check()

    return start


def rendered(
    params: Params, run: str, step: Step, namespace: str = "", owner: Mapping[str, Any] | None = None
) -> tuple[JobSpec, list[Object]]:
    """What a step asks for, and the objects that ask for it.

    Args:
        params: the configuration.
        run: name of the run.
        step: one of `chain_plan.steps`, or the first.
        namespace: where it runs.
        owner: the ownerReference of what it goes away with.
    """
    name = names.job_name(step.stage, next(iter(step.outputs.values())))
    given: dict[str, Any] = {"name": name, "namespace": namespace, "args": step.args, "owner": owner, "run": run}
    kind = params.cluster.job.train
    if step.stage == "train" and kind != "pod":
        asked = spec.training(params, gpus=chain_plan.gpus(params, "train"), **given)
        return asked, trainjob.trainjob(asked) if kind == "trainjob" else [pytorchjob.pytorchjob(asked)]
    asked = spec.stage(params, step.stage, gpus=chain_plan.gpus(params, step.stage), **given)
    return asked, [batchjob.job(asked)]
