"""How the coordinator runs a step: as the job that cluster.job asks for, else as a Job of one pod."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from components.launch import batchjob, chain_job, chain_plan, launcher, names, spec, stages
from components.launch.api import Api
from components.launch.asked import Asked
from components.launch.chain import Start
from components.launch.chain_plan import Step
from components.launch.spec import JobSpec
from trainer.config import Params
from trainer.stage import STAGES


def starter(params: Params, run: str) -> Start:
    """What runs a step of a run in the cluster that this process works in.

    Args:
        params: the configuration.
        run: name of the run.
    """
    api, owner = Api.connect(), chain_job.owner(os.environ)

    def start(step: Step, hear: Callable[[str], None]) -> None:
        name = job_name(step)

        def out(line: str) -> None:
            hear(line.removeprefix(f"{name}: "))

        # A coordinator that is stopped leaves its job: its next pod attaches to it, and whoever removes the coordinator's
        # Job removes what it owns.
        if launched(params, step.stage):
            gpus = chain_plan.gpus(params, step.stage)
            asked = Asked(step.stage, params, step.inputs, step.outputs, name, run, gpus=gpus, owner=owner)
            outcome = stages.run(api, asked, out=out, detach=True)
        else:
            job = single(params, run, step, api.namespace, owner)
            outcome = launcher.run(api, job, [batchjob.job(job)], out=out, detach=True)
        outcome.check()

    return start


def launched(params: Params, stage: str) -> bool:
    """Whether a stage is more than one pod: cluster.job says so, and it is not switched off."""
    return stage in params.cluster.job.launched and (stage != "tune" or params.tune.enabled)


def job_name(step: Step) -> str:
    """Name of the job of a step: that of its output, which no other step makes."""
    return names.job_name(step.stage, next(iter(step.outputs.values())))


def single(
    params: Params, run: str, step: Step, namespace: str = "", owner: Mapping[str, Any] | None = None
) -> JobSpec:
    """What a step asks for that is one pod.

    Args:
        params: the configuration.
        run: name of the run.
        step: one of `chain_plan.steps`, or the first.
        namespace: where it runs.
        owner: the ownerReference of what it goes away with.
    """
    name, output = job_name(step), next(iter(step.outputs.values()))
    # A stage goes on from what the pod before it has left.
    args = (*step.args, *(spec.checkpoints(params, name, output, nodes=1) if step.stage in STAGES else ()))
    return spec.stage(
        params, step.stage, name=name, namespace=namespace, args=args, owner=owner, run=run,
        gpus=chain_plan.gpus(params, step.stage),
    )  # fmt: skip
