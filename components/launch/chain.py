"""The coordinator of a run without Kubeflow Pipelines: the stages in their order, each as a job, until a model is promoted.

python -m components.launch chain --params FILE|env:NAME [--run RUN] [--until STAGE] [--only-if-new]

It runs in the cluster, as a Job of its own that `millrace run --engine kubernetes` makes, or a CronJob. Lost and started
again, it goes on: what is complete in the store is not made again, and a job that runs is attached to. What it prints is
in chain_log.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from components.launch import chain_facts, chain_log, chain_plan
from components.launch.api import ApiError
from components.launch.chain_log import Facts
from components.launch.chain_plan import CONFIGURE, Step
from components.launch.launcher import Stopped
from trainer.config import Params
from trainer.config.load import load
from trainer.config.names import nearest
from trainer.configure import NOTHING_NEW
from trainer.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_REFUSED,
    ArtifactError,
    ConfigError,
    MillraceError,
)
from trainer.stage import STAGES

# Of the coordinator's pod, where its command line is the same for every run.
RUN_ENV, UNTIL_ENV = "MILLRACE_RUN", "MILLRACE_UNTIL"
_RUN = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")

# Runs a step to its end and hands each line of its output on; raises the MillraceError with which it failed.
Start = Callable[[Step, Callable[[str], None]], None]


@dataclass(frozen=True)
class Chain:
    """A run.

    Attributes:
        params: its configuration, as `chain_plan.settled` gives it.
        run: its name.
        start: runs a step as a job.
        until: the last stage; empty for all.
        only_if_new: end early, successfully, if the champion was trained on the same version of the data.
    """

    params: Params
    run: str
    start: Start
    until: str = ""
    only_if_new: bool = False

    @property
    def root(self) -> str:
        """Where its artifacts are."""
        return chain_plan.root(self.params, self.run)

    def go(self) -> int:
        """Run what is not complete; returns the exit status of the stage that failed, or what the gate decided.

        Raises:
            ApiError: the API server does not answer any more; whoever starts the coordinator again goes on.
        Stopped: so it is with a signal.
        """
        steps, made = chain_plan.steps(self.params, self.root), 0
        for step in steps:
            facts = self._facts(step)
            if facts is None:
                break
            chain_log.say("kept", step.stage, facts=facts)
            made += 1
            if step.stage == self.until:
                return _end(EXIT_OK, f"stopped after {step.stage}, as asked")
        found: Facts = facts or {}
        if not made and not self._configure():
            return _end(EXIT_OK, NOTHING_NEW)
        for step in steps[made:]:
            found = self._run(step)
            if step.stage == self.until:
                return _end(EXIT_OK, f"stopped after {step.stage}, as asked")
        decision = found["promotion/promotion.json"]["decision"]
        return _end(EXIT_OK if decision == "promoted" else EXIT_REFUSED, decision)

    def _configure(self) -> bool:
        """Whether there is anything to do, as the first task of the pipeline for Kubeflow finds out."""
        said: list[str] = []

        def hear(text: str) -> None:
            said.append(text)
            chain_log.say("line", CONFIGURE, text)

        chain_log.say("running", CONFIGURE)
        self._try(configure(self.params, self.root, self.only_if_new), hear)
        chain_log.say("done", CONFIGURE)
        return not any(text.startswith(f"{CONFIGURE}: {NOTHING_NEW}") for text in said)

    def _run(self, step: Step) -> Facts:
        chain_log.say("running", step.stage)
        self._try(step, lambda text: chain_log.say("line", step.stage, text))
        facts = self._facts(step)
        if facts is None:
            message = f"{step.stage} ended well, but left nothing complete in {', '.join(step.outputs.values())}"
            hint = "do all pods reach the same place? see cluster.store and cluster.claim"
            raise _Failed(step.stage, ArtifactError(message, hint))
        chain_log.say("done", step.stage, facts=facts)
        return facts

    def _try(self, step: Step, hear: Callable[[str], None]) -> None:
        try:
            self.start(step, hear)
        except MillraceError as error:
            if _interrupted(error):
                raise
            raise _Failed(step.stage, error) from error

    def _facts(self, step: Step) -> Facts | None:
        """The small files of all that a step makes; None unless all of it is complete."""
        found: Facts = {}
        for port, uri in step.outputs.items():
            try:
                facts = chain_facts.facts(uri, port)
            except MillraceError as error:
                raise _Failed(step.stage, error) from error
            if facts is None:
                return None
            found |= facts
        return found


def _interrupted(error: MillraceError) -> bool:
    """Whether it was the coordinator that could not go on, and its next attempt may."""
    if isinstance(error, ApiError):
        # No answer, an old token, too busy; a refusal stays one.
        return error.status in (0, 401, 429) or error.status >= 500
    return isinstance(error, Stopped)


class _Failed(Exception):
    """A stage that failed, and why."""

    def __init__(self, stage: str, error: MillraceError) -> None:
        super().__init__(stage, error)
        self.stage, self.error = stage, error


def _end(code: int, text: str) -> int:
    chain_log.say("end", text=text, code=code)
    return code


def configure(params: Params, root: str, only_if_new: bool) -> Step:
    """The first step: the store, the data and the registry are looked at by the image and the account that will read them."""
    tree = params.model_dump(mode="json", exclude={"cluster"})  # checked here, where it is used
    values = {"params": json.dumps(tree), "store": root, "only_if_new": only_if_new}
    given = {"inputs": {"parameterValues": values}, "outputs": {"outputFile": "executor_output.json"}}
    return Step(CONFIGURE, (CONFIGURE, "--executor-input", json.dumps(given)), {}, {CONFIGURE: f"{root}/{CONFIGURE}"})


def run(chain: Chain) -> int:
    """Run the chain and say how it ended; returns the exit status of its process.

    A status from 128 on is worth another try of the Job, which a stage that failed is not. A candidate that the gate
    refused is an answer and no failure: a schedule's Job that ended so has done its work.
    """
    try:
        code = chain.go()
        return EXIT_OK if code == EXIT_REFUSED else code
    except _Failed as failed:
        code = failed.error.exit_code
        chain_log.say("failed", failed.stage, str(failed.error), code)
        chain_log.say("end", failed.stage, code=code)
        return code if code < 128 else EXIT_FAILURE
    except Stopped as error:
        return error.exit_code
    except ApiError as error:
        chain_log.say("line", text=f"coordinator: {error.message}; the next attempt goes on")
        return EXIT_PREEMPTED


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb `chain` on the command line of `python -m components.launch`."""
    text = "run all stages, each as a job of the cluster"
    sub = verbs.add_parser("chain", help=text, description=f"{text[0].upper()}{text[1:]}.")
    sub.add_argument(
        "--params", metavar="FILE", required=True, help="params.yaml, or env:NAME of the variable that holds it"
    )
    sub.add_argument(
        "--run", metavar="RUN", default="", help=f"name of the run (default: {RUN_ENV}, then the Job's own name)"
    )
    sub.add_argument("--until", metavar="STAGE", default="", help="stop after this stage")
    sub.add_argument(
        "--only-if-new", action="store_true", help="end early, successfully, if the champion was trained on this data"
    )
    sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="override a parameter")
    sub.set_defaults(verb=main)


def main(args: argparse.Namespace) -> int:
    """`python -m components.launch chain`; returns its exit status."""
    try:
        return run(_chain(args))
    except MillraceError as error:  # a parameter is wrong, or there is no cluster
        chain_log.say("failed", CONFIGURE, str(error), error.exit_code)
        chain_log.say("end", CONFIGURE, code=error.exit_code)
        return error.exit_code


def _chain(args: argparse.Namespace) -> Chain:
    from components.launch import chain_start

    params = chain_plan.settled(load(args.params, args.overrides))
    name = args.run or os.environ.get(RUN_ENV) or os.environ.get("MILLRACE_OWNER", "")
    if not _RUN.fullmatch(name):
        raise ConfigError(
            f"--run {name}: must be lower-case letters, digits and `-`", f"name the run, here or in {RUN_ENV}"
        )
    until = args.until or os.environ.get(UNTIL_ENV, "")
    if until and until not in STAGES:
        raise ConfigError(f"--until {until}: no such stage; {nearest(until, STAGES)}", "correct the name")
    return Chain(params, name, chain_start.starter(params, name), until, args.only_if_new)
