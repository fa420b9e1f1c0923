"""The stage contract: one table of stages, and the one way in which each is run.

A stage is `run(call: Call) -> Result`. Its inputs are checked before work starts; its outputs are built beside their
targets and renamed when complete, with a record of how they were made. dvc.yaml is checked against this table, the
KFP components are typed from it, and the help of `python -m trainer` is printed from it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from trainer import __version__, plugins, storage
from trainer import scratch as scratches
from trainer.artifacts import manifest
from trainer.artifacts.publish import building
from trainer.config import Monitor, Parallel, Params
from trainer.config.names import nearest
from trainer.errors import ConfigError, GateRefused
from trainer.parallel import nodes
from trainer.record import Clock, make_record


@dataclass(frozen=True)
class Port:
    """An input or output of a stage: the kind of its artifact, and whether it may be left out."""

    kind: str
    help: str
    optional: bool = False


@dataclass(frozen=True)
class Call:
    """What a stage function is given.

    Attributes:
        params: the whole resolved configuration; a stage reads only its own sections.
        inputs: local folders, verified; an optional input that was not given is absent.
        outputs: empty local folders to fill, one per output.
        scratch: a folder that outlives a killed stage, for checkpoints and journals; removed when the stage is done.
            It is the same for the same parameters (those of `FREE` aside) and inputs, and another one otherwise.
    """

    params: Params
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    scratch: Path


@dataclass(frozen=True)
class Result:
    """What a stage function returns.

    Attributes:
        metrics: scalar figures for people and for metric stores.
        meta: facts about each output's content, the same in every run with the same inputs (name -> JSON object).
        volatile: output files (relative paths) that may differ between such runs: timings, logs.
        gate_reason: why a gate refused; the outputs are published and the stage exits with 4.
        params: sections as they were really used, where they are not those of the call: they go into the record.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)
    volatile: tuple[str, ...] = ()
    gate_reason: str = ""
    params: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A row of the stage table. `target` is the stage function, imported when it is run."""

    name: str
    help: str
    target: str
    sections: tuple[str, ...]
    inputs: dict[str, Port]
    outputs: dict[str, Port]


# Parameters by which a killed run and the one that goes on from it may differ: where and how often, not what. With
# another number of threads the run is not equal in every bit, because sums are divided among threads.
FREE: dict[str, frozenset[str]] = {
    "train": frozenset(
        {
            "processes",
            "threads",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_best",
            "checkpoint_async",
            "checkpoint_store",
            "log_every",
            "statistics_every",
            "trace",
            "memory_gb",
            "out_of_memory",
            "offload",
            "recompute",
        }
    ),
    "parallel": frozenset(Parallel.model_fields),
    "monitor": frozenset(Monitor.model_fields),
}

_DATASET = Port("dataset", "the preprocessed dataset")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "preprocess",
            "clean, deduplicate, split, tokenise and pack raw data",
            "trainer.data.stage:run",
            ("data", "task"),
            {},
            {"dataset": Port("dataset", "train, val and test splits, tokenizer, labels and counts")},
        ),
        Stage(
            "tune",
            "search for good hyper-parameters",
            "trainer.tune.stage:run",
            ("task", "model", "train", "tune"),
            {"dataset": _DATASET},
            {"tuning": Port("tuning", "best parameters, all trials and a page of plots")},
        ),
        Stage(
            "train",
            "train the model, with the best parameters where a search was made",
            "trainer.train.stage:run",
            ("task", "model", "train", "parallel", "monitor"),
            {"dataset": _DATASET, "tuning": Port("tuning", "best parameters of the search", optional=True)},
            {"model": Port("model", "the trained model, the teacher of the student")},
        ),
        Stage(
            "distill",
            "teach a small student what the trained model knows",
            "trainer.compress.distill_stage:run",
            ("task", "train", "distill"),
            {"dataset": _DATASET, "model": Port("model", "the teacher")},
            {"student": Port("model", "the student")},
        ),
        Stage(
            "quantize",
            "prune, quantise to int8 and export, each validated right after",
            "trainer.compress.quantize_stage:run",
            ("task", "train", "quantize"),
            {"dataset": _DATASET, "student": Port("model", "the model to quantise")},
            {"quantized": Port("model", "int8 model.onnx, safetensors and a table of size, latency and score")},
        ),
        Stage(
            "evaluate",
            "test the candidate beside a baseline, the teacher and the champion, and write the report",
            "trainer.evaluate.stage:run",
            ("task", "model", "train", "evaluate", "promote"),
            {
                "dataset": _DATASET,
                "model": Port("model", "the teacher"),
                "student": Port("model", "the student"),
                "quantized": Port("model", "the candidate: what would be served"),
                "tuning": Port("tuning", "the search, for the report", optional=True),
            },
            {"evaluation": Port("evaluation", "metrics.json, report.html, predictions and the gate's decision")},
        ),
        Stage(
            "promote",
            "enter the candidate in the registry and make it the champion if the gate lets it pass",
            "trainer.registry_stage:run",
            ("promote",),
            {
                "dataset": _DATASET,
                "quantized": Port("model", "the candidate"),
                "evaluation": Port("evaluation", "the gate's decision and its figures"),
            },
            {"promotion": Port("promotion", "what was decided and which version is the champion")},
        ),
    )
}


def execute(
    name: str,
    params: Params,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    scratch: str = "",
    *,
    expect: Callable[[Mapping[str, Any]], None] | None = None,
    after: Callable[[Mapping[str, Path], Mapping[str, Path], Result], None] | None = None,
) -> Result:
    """Run a stage: check its inputs, build its outputs, publish them with their records.

    Args:
        name: a name of `STAGES`.
        params: the resolved configuration.
        inputs: name -> URI of each input folder.
        outputs: name -> URI of each output folder.
        scratch: folder for state that outlives a kill; by default `.scratch` beside the first output.
        expect: called with each output's meta before anything is published; what it raises fails the stage.
        after: called with the local folders of inputs and finished outputs, and the result.

    Raises:
        ConfigError: a port is unknown, missing or given twice.
        ArtifactError: an input is missing, incomplete, corrupted or of the wrong kind.
        GateRefused: the stage's gate refused; the outputs are published all the same.
        MillraceError: whatever the stage raises.
    """
    stage = STAGES[name]
    _check_ports(stage, "--in", stage.inputs, inputs)
    _check_ports(stage, "--out", stage.outputs, outputs)
    clock = Clock()
    _check_apart(inputs, outputs)
    first = next(iter(outputs.values()))
    for uri in filter(storage.is_remote, outputs.values()):
        storage.exists(uri)  # a missing driver or credentials are found before the work, not after it
    with tempfile.TemporaryDirectory(prefix="millrace-") as temporary:
        cache = Path(temporary)
        local = {port: storage.fetch(uri, cache / "in" / port) for port, uri in inputs.items()}
        manifests = {port: manifest.read(folder, stage.inputs[port].kind) for port, folder in local.items()}
        tree = params.model_dump(mode="json")
        sections = {section: tree[section] for section in stage.sections}
        targets = {port: _local_target(uri, cache / "out" / port) for port, uri in outputs.items()}
        fingerprint = _fingerprint(name, sections, manifests)
        if nodes.here().rank:
            return _help(stage, Call(params, local, {}, scratches.folder_of(name, fingerprint, first, scratch)), cache)
        with scratches.held(name, fingerprint, first, scratch) as working:
            with ExitStack() as stack, storage.explained(", ".join(outputs.values()), storage.UNWRITABLE):
                folders = {port: stack.enter_context(building(target)) for port, target in targets.items()}
                result: Result = plugins.load(stage.target)(Call(params, local, folders, working))
                for port, folder in folders.items():
                    if expect:
                        expect(result.meta.get(port, {}))
                    record = make_record(name, clock, sections | result.params, manifests, result.metrics)
                    manifest.seal(folder, stage.outputs[port].kind, result.meta.get(port, {}), record, result.volatile)
            for port, uri in outputs.items():
                if storage.is_remote(uri):
                    storage.send(targets[port], uri)
            if after:
                after(local, targets, result)
    if result.gate_reason:
        raise GateRefused(result.gate_reason, metrics=result.metrics)
    return result


def _help(stage: Stage, call: Call, cache: Path) -> Result:
    """Take part in a stage that runs on several nodes; the first of them publishes its outputs, and holds the scratch."""
    outputs = {port: cache / "help" / port for port in stage.outputs}
    for folder in outputs.values():
        folder.mkdir(parents=True)
    result: Result = plugins.load(stage.target)(replace(call, outputs=outputs))
    return result


def _fingerprint(name: str, sections: Mapping[str, Any], manifests: Mapping[str, manifest.Manifest]) -> str:
    digests = {port: found.digest for port, found in manifests.items()}
    fixed = {section: _fixed(section, values) for section, values in sections.items()}
    return hashlib.sha256(manifest.canonical([__version__, name, fixed, digests])).hexdigest()[:12]


def _fixed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in FREE.get(section, ())}


def _local_target(uri: str, cache: Path) -> Path:
    return cache if storage.is_remote(uri) else storage.local_path(uri)


def _check_ports(stage: Stage, flag: str, ports: Mapping[str, Port], given: Mapping[str, str]) -> None:
    for port in given:
        if port not in ports:
            message = f"{stage.name}: {flag} {port}: no such name; {nearest(port, ports)}"
            raise ConfigError(message, f"see python -m trainer {stage.name} --help")
    for port, spec in ports.items():
        if port not in given and not spec.optional:
            raise ConfigError(f"{stage.name}: {flag} {port}=URI is missing ({spec.help})", f"add {flag} {port}=PATH")


def _check_apart(inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """An output replaces its whole folder, so it must be neither in, nor around, another output or an input."""
    flags = {**{f"--in {port}": uri for port, uri in inputs.items()}, **{f"--out {p}": u for p, u in outputs.items()}}
    places = {flag: _place(uri) for flag, uri in flags.items()}
    for first, second in itertools.combinations(places, 2):
        a, b = places[first], places[second]
        if second.startswith("--out") and (a.is_relative_to(b) or b.is_relative_to(a)):
            raise ConfigError(f"{second}={flags[second]} overlaps {first}={flags[first]}", "choose another folder")


def _place(uri: str) -> PurePath:
    return PurePosixPath(uri.rstrip("/")) if storage.is_remote(uri) else storage.local_path(uri).resolve()
