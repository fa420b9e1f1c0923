"""A step of Kubeflow Pipelines that launches: `python -m components.launch STAGE --executor-input '{{$}}'`.

Parameters are those of the stage's own step (`trainer.executor`), and besides: `cluster_params`, section cluster as it was
compiled in; `nodes`, pods that train together; `gpus`, accelerators of each. Artifacts pass by URI, never through here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from components.launch import apart, stages, submit
from components.launch.api import Api
from components.launch.asked import Asked, small_files
from trainer import executor
from trainer.artifacts import manifest
from trainer.errors import EXIT_OK, ConfigError, MillraceError
from trainer.executor import Given
from trainer.stage import STAGES, Result


def run(stage: str, text: str, overrides: Sequence[str]) -> int:
    """Run a stage as a job, as the JSON says, and write the executor output; returns the exit status.

    Raises:
        ConfigError: the JSON is not an ExecutorInput, a parameter is wrong, or artifacts do not go through a store.
        MillraceError: the job failed.
    """
    given = executor.read(text)
    try:
        asked = read(stage, given, text, overrides)
        outcome = stages.run(Api.connect(), asked)
        outcome.check()
    except MillraceError as error:
        executor.tell_failure(given, stage, {}, error)
        raise
    tell(given, asked)
    return EXIT_OK


def read(stage: str, given: Given, text: str, overrides: Sequence[str]) -> Asked:
    """What an ExecutorInput asks for.

    Raises:
        ConfigError: a parameter is wrong.
        StorageError: an input is not where its reference says.
    """
    params = executor.parameters(text, overrides)
    inputs = {}
    for port in STAGES[stage].inputs:
        if port in given.inputs:
            path = executor.local_artifact(given.inputs[port]["uri"])
            inputs[port] = str(apart.call("trainer.executor:dereference", path))
    outputs = {port: executor.place(given, port) for port in STAGES[stage].outputs if port in given.outputs}
    return Asked(
        stage, params, inputs, outputs, run=given.run, nodes=_count(given, "nodes", 1), gpus=_count(given, "gpus", 0),
        owner=submit.step_owner(os.environ),
    )  # fmt: skip


def _count(given: Given, name: str, least: int) -> int | None:
    """A parameter that is a number as text; None if it was not given.

    Raises:
        ConfigError: it is no number, or too small.
    """
    text = str(given.values.get(name) or "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ConfigError(
            f"parameter {name}: must be a whole number from {least} (given {text!r})", f"for example {least}"
        )
    return int(text)


def tell(given: Given, asked: Asked) -> None:
    """Write the executor output: references to what was made, its figures, and what the run page shows."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as temporary:
        inputs = {port: small_files(uri, Path(temporary) / "in" / port) for port, uri in asked.inputs.items()}
        outputs = {port: small_files(uri, Path(temporary) / "out" / port) for port, uri in asked.outputs.items()}
        made = {port: manifest.read(folder, verify=False) for port, folder in outputs.items()}
        metrics = next(iter(made.values())).record.get("metrics") or {}
        figures = {name: float(value) for name, value in metrics.items() if value is not None}
        metadata = executor.publish(given, asked.stage, asked.outputs, inputs, outputs, Result(figures))
        executor.write(given, metadata)
