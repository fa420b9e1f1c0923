"""The stage contract inside Kubeflow Pipelines: `--executor-input '{{$}}'`.

KFP replaces the placeholder by one line of JSON (ExecutorInput of pipeline_spec.proto) with the URIs of artifacts,
the values of parameters and the path for the executor output. The backend and local runs differ in names and
places, so nothing is assumed but what the JSON says. Parameters of a stage:

SECTION_params   a section of params.yaml as JSON text, for each section that the stage reads
data_version     what the raw data is expected to be; preprocess refuses other data, so that no cache serves it
store            a URI or mounted path: outputs go there, and KFP's own artifacts only refer to them
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainer import storage, views
from trainer.artifacts import manifest
from trainer.config import Params
from trainer.config.load import apply_overrides, completed, validate
from trainer.config.text import parse_yaml
from trainer.errors import EXIT_OK, ArtifactError, ConfigError, DataError, GateRefused, MillraceError, StorageError
from trainer.stage import STAGES, Result, execute

# Name of the parameter that holds a section of params.yaml as JSON text: sections and artifacts may share a name.
SECTION = "{}_params"
# In place of an artifact's files: where they are.
REFERENCE = "reference.json"

# KFP mounts object stores below these folders; the path inside is the URI without its scheme (LocalPathForURI).
_MOUNTS = {"minio://": "/minio/", "s3://": "/s3/", "gs://": "/gcs/"}
_IMAGE = "oci://"  # of a model in an image


@dataclass(frozen=True)
class Given:
    """An ExecutorInput: parameter values, first artifact of each input and output port, and where the output goes."""

    values: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    output_file: Path

    @property
    def store(self) -> str:
        """Where outputs go by reference; empty if they go through KFP."""
        return store_of(self.values)

    @property
    def run(self) -> str:
        """Id of the pipeline run, as in the backend's URIs, `ROOT/PIPELINE/RUN/TASK/ATTEMPT/PORT`; empty in local runs.

        As a parameter it would be in KFP's cache key, and nothing would ever be taken from the cache.
        """
        uris = (artifact["uri"] for artifact in self.outputs.values())
        return next((uri.split("/")[-4] for uri in uris if "://" in uri and uri.count("/") > 5), "")


def store_of(values: Mapping[str, Any]) -> str:
    """The parameter `store` of a task, as people paste it; empty if outputs go through KFP."""
    return str(values.get("store") or "").strip().rstrip("/")


def read(text: str) -> Given:
    """Parse an ExecutorInput.

    Raises:
        ConfigError: it is none.
    """
    with _parsing():
        given = json.loads(text)
        inputs, outputs = given.get("inputs", {}), given["outputs"]
        return Given(
            dict(inputs.get("parameterValues", {})),
            _first(inputs.get("artifacts", {})),
            _first(outputs.get("artifacts", {})),
            Path(outputs["outputFile"]),
        )


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        message = f"--executor-input: not an ExecutorInput: {type(error).__name__}: {error}"
        raise ConfigError(message, "pass '{{$}}' and let KFP fill it in") from None


def _first(ports: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The first artifact of each port; an optional input that was not given is absent, or its list is empty."""
    found = {port: list(content.get("artifacts", [])) for port, content in ports.items()}
    return {port: {**artifacts[0], "uri": str(artifacts[0]["uri"])} for port, artifacts in found.items() if artifacts}


def local_artifact(uri: str) -> str:
    """The path at which KFP mounts an artifact's URI."""
    for scheme, mount in _MOUNTS.items():
        if uri.startswith(scheme):
            return mount + uri.removeprefix(scheme)
    if uri.startswith(_IMAGE):
        return f"/oci/{uri.removeprefix(_IMAGE).replace('/', '_')}/models"
    return uri


def run(name: str, text: str, overrides: Sequence[str], scratch: str = "") -> int:
    """Run a stage as the JSON says and write the executor output; returns the exit status.

    Args:
        name: a name of `STAGES`.
        text: the ExecutorInput.
        overrides: words `section.key=value` that come after, and win over, the parameters of the JSON.
        scratch: as for `trainer.stage.execute`. By default it is beside the outputs, in a mounted store too: the attempts
            of a task share their URIs, so a pod that is started again finds the checkpoints of the one that was lost,
            and no other run with the same parameters does.

    Raises:
        ConfigError: the JSON is not an ExecutorInput, or a parameter is wrong.
        DataError: the raw data is not of the version that was expected.
        GateRefused: the gate refused; the executor output is written all the same.
    """
    stage, given = STAGES[name], read(text)
    params = parameters(text, overrides)
    inputs = {
        port: dereference(local_artifact(given.inputs[port]["uri"])) for port in stage.inputs if port in given.inputs
    }
    outputs = {port: place(given, port) for port in stage.outputs if port in given.outputs}
    metadata: dict[str, dict[str, Any]] = {}

    def after(ins: Mapping[str, Path], outs: Mapping[str, Path], result: Result) -> None:
        temporary = _is_temporary(params.promote.registry)
        metadata.update(publish(given, name, outputs, ins, outs, result, temporary=temporary))

    refused: GateRefused | None = None
    try:
        execute(name, params, inputs, outputs, scratch, expect=_expected(given, name), after=after)
    except GateRefused as error:
        refused = error
    except MillraceError as error:
        tell_failure(given, name, inputs, error)
        raise
    write(given, metadata)
    if refused:
        raise refused
    return EXIT_OK


def publish(
    given: Given,
    name: str,
    places: Mapping[str, str],
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    result: Result,
    *,
    temporary: bool = False,
) -> dict[str, dict[str, Any]]:
    """Leave references to the outputs that went to the store, and write what the run page shows; returns all metadata.

    Args:
        given: the ExecutorInput.
        name: of the stage.
        places: where the outputs are, by URI.
        inputs: local folders of the inputs; their small files are enough.
        outputs: local folders of the outputs, likewise.
        result: what the stage returned.
        temporary: as for `show`.
    """
    metadata: dict[str, dict[str, Any]] = {}
    for port, folder in outputs.items():
        found = manifest.read(folder, verify=False)
        if port in given.outputs and places[port] != local_artifact(given.outputs[port]["uri"]):
            refer(local_artifact(given.outputs[port]["uri"]), places[port], found.digest)
        metadata[port] = _metadata(found, result.metrics)
    return metadata | show(given, name, inputs, outputs, result, temporary=temporary)


def tell_failure(given: Given, name: str, inputs: Mapping[str, str], error: MillraceError) -> None:
    """Write on the run page, if that was asked for, why a stage failed."""
    if "summary" in given.outputs:
        there = {port: Path(uri) for port, uri in inputs.items() if not storage.is_remote(uri) and Path(uri).exists()}
        page = views.summary(name, there, {}, {}, error=str(error))
        storage.write_atomic(Path(local_artifact(given.outputs["summary"]["uri"])), page.encode())


def _expected(given: Given, name: str) -> Any:
    """A check of preprocess's output: data that changed since `configure` must not be cached under the old version."""
    version = str(given.values.get("data_version") or "")

    def check(meta: Mapping[str, Any]) -> None:
        if version and name == "preprocess" and meta.get("data_version") != version:
            message = (
                f"data.source: the data changed while the run began: version {meta.get('data_version')}, not {version}"
            )
            raise DataError(message, "start the run again")

    return check


def parameters(text: str, overrides: Sequence[str]) -> Params:
    """The configuration that an ExecutorInput's sections and further overrides make.

    Raises:
        ConfigError: the JSON is not an ExecutorInput, or a parameter is wrong.
    """
    with _parsing():
        values = dict(json.loads(text).get("inputs", {}).get("parameterValues", {}))
    tree: dict[str, Any] = {}
    for section in Params.model_fields:
        content = values.get(SECTION.format(section))
        if isinstance(content, str):
            content = parse_yaml(content, f"parameter {SECTION.format(section)}")
        if content is not None and not isinstance(content, dict):
            raise ConfigError(
                f"parameter {SECTION.format(section)}: must be a mapping", f"pass the section {section} as JSON"
            )
        if content:
            tree[section] = content
    return validate(completed(apply_overrides(tree, overrides)), "parameters")


def place(given: Given, port: str) -> str:
    """Where an output's files go: KFP's own path, or below the store by run, task and attempt, as in KFP's URI."""
    uri = given.outputs[port]["uri"]
    if not given.store:
        return local_artifact(uri)
    return "/".join([given.store, *PurePosixPath(local_artifact(uri)).parts[-4 if "://" in uri else -3 :]])


def refer(path: str, uri: str, digest: str) -> None:
    """Leave a reference to an artifact's files in place of the artifact."""
    content = json.dumps({"uri": uri, "digest": digest})
    storage.write_atomic(Path(path) / REFERENCE, content.encode())


def dereference(path: str) -> str:
    """Where an input's files are: the path itself, or what its reference names.

    Raises:
        StorageError: the reference is none, or what it names is not there.
        ArtifactError: something else is there by now.
    """
    reference = Path(path) / REFERENCE
    if storage.is_remote(path) or not reference.is_file():
        return path
    again = "run the pipeline again without its cache: an earlier result is used that is no longer in the store"
    try:
        content = json.loads(reference.read_bytes())
        uri, digest = str(content["uri"]), str(content["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StorageError(f"{reference}: not a reference", "run the stage that makes it again") from None
    try:
        found = json.loads(storage.read_bytes(f"{uri}/{storage.MANIFEST}"))["digest"]
    except (StorageError, ValueError, KeyError, TypeError):
        raise StorageError(f"{uri}: not there any more, or not readable", again) from None
    if found != digest:
        raise ArtifactError(f"{uri}: another artifact than the one that was made ({digest[:12]})", again)
    return uri


def _metadata(found: manifest.Manifest, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Flat metadata of an artifact: strings and finite numbers (a null would fail the task)."""
    version = found.meta.get("data_version") or found.record.get("data_version")
    figures = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
    return {**figures, "digest": found.digest, "data_version": str(version or "")}


def _is_temporary(registry: str) -> bool:
    """Whether a registry ends with this container: the one that `configure` chose because none was given."""
    return not storage.is_remote(registry) and storage.local_path(registry).is_relative_to(tempfile.gettempdir())


def show(
    given: Given,
    name: str,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    result: Result,
    *,
    temporary: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write what the run page shows, for each view that was asked for; returns their metadata.

    `temporary`: the registry ends with this container, which the page then says.
    """
    metadata: dict[str, dict[str, Any]] = {}
    wanted = {port: Path(local_artifact(given.outputs[port]["uri"])) for port in given.outputs}
    if "summary" in wanted:
        text = views.summary(name, inputs, outputs, result.metrics, temporary=temporary)
        storage.write_atomic(wanted["summary"], text.encode())
        metadata["summary"] = {}
    for port, page in views.pages(name, outputs).items():
        if port in wanted:
            storage.write_atomic(wanted[port], page.read_bytes())
            metadata[port] = {}
    if "metrics" in wanted:
        metadata["metrics"] = {**views.metrics(name, result.metrics, outputs)}
    if {"confusion", "roc"} & set(wanted):
        found = views.classification(outputs)
        for port, key in (("confusion", "confusionMatrix"), ("roc", "confidenceMetrics")):
            if port in wanted and key in found:
                metadata[port] = {key: found[key]}
    return metadata


def write(given: Given, metadata: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any] | None = None) -> None:
    """Write the ExecutorOutput.

    Args:
        given: the ExecutorInput.
        metadata: for each artifact that was made; others are left out, `executor-logs` among them.
        values: output parameters.
    """
    artifacts: dict[str, Any] = {}
    for port, fields in metadata.items():
        if port in given.outputs:
            # No other fields: the backend fails a task whose output has one that its version does not know.
            entry = {key: given.outputs[port][key] for key in ("name", "type", "uri") if key in given.outputs[port]}
            artifacts[port] = {"artifacts": [{**entry, "metadata": dict(fields)}]}
    content: dict[str, Any] = {"artifacts": artifacts}
    if values:
        content["parameterValues"] = dict(values)
    storage.write_atomic(given.output_file, json.dumps(content, allow_nan=False).encode())
