"""The stage contract inside Kubeflow Pipelines: `--executor-input '{{$}}'`.

KFP replaces the placeholder by one line of JSON (ExecutorInput of pipeline_spec.proto) with the URIs of artifacts,
the values of parameters and the path for the executor output. The backend and local runs differ in names and
places, so nothing is assumed but what the JSON says. Parameters: `params` (a configuration as YAML or JSON text) and
`overrides` (a list, or words divided by line breaks or spaces).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.artifacts import manifest
from trainer.config.load import apply_overrides, parse_yaml, validate
from trainer.errors import EXIT_OK, ConfigError, GateRefused
from trainer.stage import STAGES, Result, execute

# KFP mounts object stores below these folders; the path inside is the URI without its scheme.
_MOUNTS = {"minio://": "/minio/", "s3://": "/s3/", "gs://": "/gcs/", "oci://": "/oci/"}


def local_artifact(uri: str) -> str:
    """The path at which KFP mounts an artifact's URI."""
    for scheme, mount in _MOUNTS.items():
        if uri.startswith(scheme):
            return mount + uri.removeprefix(scheme)
    return uri


def run(name: str, text: str, overrides: Sequence[str]) -> int:
    """Run a stage as the JSON says and write the executor output; returns the exit status.

    Raises:
        ConfigError: the JSON is not an ExecutorInput, or a parameter is wrong.
        GateRefused: the gate refused; the executor output is written all the same.
    """
    stage = STAGES[name]
    try:
        given = json.loads(text)
        values = dict(given.get("inputs", {}).get("parameterValues", {}))
        inputs = _artifacts(given.get("inputs", {}).get("artifacts", {}), list(stage.inputs))
        outputs = _artifacts(given["outputs"].get("artifacts", {}), list(stage.outputs))
        output_file = Path(given["outputs"]["outputFile"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        message = f"--executor-input: not an ExecutorInput: {type(error).__name__}: {error}"
        raise ConfigError(message, "pass '{{$}}' and let KFP fill it in") from None
    tree = parse_yaml(str(values.get("params") or "{}"), "parameter params") or {}
    if not isinstance(tree, dict):
        raise ConfigError("parameter params: must be a mapping of sections", "pass the text of a params.yaml")
    given_words = values.get("overrides") or []
    words = given_words.split() if isinstance(given_words, str) else [str(word) for word in given_words]
    params = validate(apply_overrides(tree, [*words, *overrides]), "parameter params")
    refused: GateRefused | None = None
    try:
        result = execute(name, params, inputs, outputs)
    except GateRefused as error:
        refused, result = error, Result()
    storage.write_atomic(output_file, json.dumps(_output(given, outputs, result)).encode())
    if refused:
        raise refused
    return EXIT_OK


def _artifacts(ports: Mapping[str, Any], wanted: list[str]) -> dict[str, str]:
    """Name -> local path of the first artifact of each port that the stage knows; `executor-logs` and metrics are skipped."""
    return {port: local_artifact(ports[port]["artifacts"][0]["uri"]) for port in wanted if port in ports}


def _output(given: Mapping[str, Any], outputs: Mapping[str, str], result: Result) -> dict[str, Any]:
    """The ExecutorOutput: each artifact with flat metadata (strings and numbers; a null would fail the task)."""
    artifacts = {}
    for port, path in outputs.items():
        entry = dict(given["outputs"]["artifacts"][port]["artifacts"][0])
        found = manifest.read(path, verify=False)
        entry["metadata"] = {"digest": found.digest, "data_version": str(found.meta.get("data_version", ""))}
        entry["metadata"] |= {key: value for key, value in result.metrics.items() if isinstance(value, (int, float))}
        artifacts[port] = {"artifacts": [entry]}
    return {"artifacts": artifacts}
