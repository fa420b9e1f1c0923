"""The stage contract inside Kubeflow Pipelines: `--executor-input '{{$}}'`.

KFP replaces the placeholder by one line of JSON (ExecutorInput of pipeline_spec.proto) with the URIs of artifacts,
the values of parameters and the path for the executor output. The backend and local runs differ in names and
places, so nothing is assumed but what the JSON says. Parameters: `params` (a configuration as YAML or JSON text) and
`overrides` (a list, or a text: words divided by line breaks, or by spaces before the next key).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.artifacts import manifest
from trainer.config import Params
from trainer.config.load import apply_overrides, validate
from trainer.config.text import parse_yaml
from trainer.errors import EXIT_OK, ConfigError, GateRefused
from trainer.stage import STAGES, execute

# A space divides words only if a key follows: lists and texts may hold spaces.
_BETWEEN_WORDS = re.compile(r"\s*\n\s*|\s+(?=[A-Za-z_][\w-]*(?:\.[\w-]+)+=)")

# KFP mounts object stores below these folders; the path inside is the URI without its scheme.
# Name of the parameter that holds a section of params.yaml as JSON text: sections and artifacts may share a name.
SECTION = "{}_params"

_MOUNTS = {"minio://": "/minio/", "s3://": "/s3/", "gs://": "/gcs/", "oci://": "/oci/"}


def local_artifact(uri: str) -> str:
    """The path at which KFP mounts an artifact's URI."""
    for scheme, mount in _MOUNTS.items():
        if uri.startswith(scheme):
            return mount + uri.removeprefix(scheme)
    return uri


def run(name: str, text: str, overrides: Sequence[str], scratch: str = "") -> int:
    """Run a stage as the JSON says and write the executor output; returns the exit status.

    Args:
        name: a name of `STAGES`.
        text: the ExecutorInput.
        overrides: words `section.key=value` that come after, and win over, those of the JSON.
        scratch: as for `trainer.stage.execute`.

    Raises:
        ConfigError: the JSON is not an ExecutorInput, or a parameter is wrong.
        GateRefused: the gate refused; the executor output is written all the same.
    """
    stage = STAGES[name]
    with _parsing():
        given = json.loads(text)
        inputs = _artifacts(given.get("inputs", {}).get("artifacts", {}), list(stage.inputs))
        outputs = _artifacts(given["outputs"].get("artifacts", {}), list(stage.outputs))
        output_file = Path(given["outputs"]["outputFile"])
    params = parameters(text, overrides)
    refused: GateRefused | None = None
    try:
        metrics = execute(name, params, inputs, outputs, scratch).metrics
    except GateRefused as error:
        refused, metrics = error, error.metrics
    content = json.dumps(_output(given, outputs, metrics), allow_nan=False)
    storage.write_atomic(output_file, content.encode())
    if refused:
        raise refused
    return EXIT_OK


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        message = f"--executor-input: not an ExecutorInput: {type(error).__name__}: {error}"
        raise ConfigError(message, "pass '{{$}}' and let KFP fill it in") from None


def parameters(text: str, overrides: Sequence[str]) -> Params:
    """The configuration that an ExecutorInput's parameters `params` and `overrides` and further overrides make.

    Raises:
        ConfigError: the JSON is not an ExecutorInput, or a parameter is wrong.
    """
    with _parsing():
        values = dict(json.loads(text).get("inputs", {}).get("parameterValues", {}))
    tree = values.get("params") or {}
    if isinstance(tree, str):
        tree = parse_yaml(tree, "parameter params")
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError("parameter params: must be a mapping of sections", "pass the text of a params.yaml")
    words = values.get("overrides") or []
    if isinstance(words, str):
        words = [word for word in _BETWEEN_WORDS.split(words.strip()) if word]
    if not isinstance(words, list):
        raise ConfigError("parameter overrides: must be a list or a text", "for example train.lr=1e-3 train.epochs=2")
    return validate(apply_overrides(tree or {}, [*map(str, words), *overrides]), "parameter params")


def _artifacts(ports: Mapping[str, Any], wanted: list[str]) -> dict[str, str]:
    """Name -> local path of the first artifact of each port that the stage knows; `executor-logs` and metrics are skipped.

    An optional input that was not given is absent, or its list is empty.
    """
    lists = {port: ports[port].get("artifacts", []) for port in wanted if port in ports}
    return {port: local_artifact(artifacts[0]["uri"]) for port, artifacts in lists.items() if artifacts}


def _output(given: Mapping[str, Any], outputs: Mapping[str, str], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The ExecutorOutput: each artifact with flat metadata (strings and numbers; a null would fail the task)."""
    artifacts = {}
    for port, path in outputs.items():
        entry = given["outputs"]["artifacts"][port]["artifacts"][0]
        # No other fields: the backend fails a task whose output has one that its version does not know.
        entry = {key: entry[key] for key in ("name", "type", "uri") if key in entry}
        metadata: dict[str, str | int | float] = {
            key: float(value) for key, value in metrics.items() if math.isfinite(value)
        }
        if not storage.is_remote(path):
            found = manifest.read(path, verify=False)
            version = found.meta.get("data_version") or found.record.get("data_version")
            metadata |= {"digest": found.digest, "data_version": str(version or "")}
        artifacts[port] = {"artifacts": [{**entry, "metadata": metadata}]}
    return {"artifacts": artifacts}
