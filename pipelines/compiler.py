"""The pipeline as the package that Kubeflow Pipelines takes: `millrace compile`.

A package is YAML: the pipeline's intermediate representation, and as a second document what Kubernetes is told of
each task. The parameters of the training are inputs of the pipeline; the project's own are their defaults.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainer import presets, storage
from trainer.config import Params
from trainer.config.load import validate
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError

HEADER = "# The training pipeline for Kubeflow Pipelines 2.15 to 2.17, made by `millrace compile`.\n"

# KFP's launcher is given the parameters in one word of a command line, of which Linux takes 128 KiB (MAX_ARG_STRLEN); there
# are others beside them, and the URIs of artifacts.
MAX_BYTES = 96 * 1024


def package(params: Params) -> list[dict[str, Any]]:
    """The documents of the package: the pipeline spec and the platform spec.

    Raises:
        ConfigError: no run of it could start.
    """
    job = params.cluster.job
    if job.nodes > 1 and job.train == "pod":
        raise ConfigError(
            f"cluster.job.nodes: {job.nodes}: with cluster.job.train=pod the pipeline trains in the pod of its step",
            "set cluster.job.train=pytorchjob, or cluster.job.nodes=1",
        )
    with quiet():
        from kfp import compiler

        from pipelines.training import training

        with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
            path = Path(folder) / "package.yaml"
            compiler.Compiler().compile(training(params, arguments(params)), str(path))
            return [dict(document) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def spec(params: Params) -> dict[str, Any]:
    """The pipeline spec (the intermediate representation)."""
    return package(params)[0]


def text(params: Params) -> str:
    """The package as YAML."""
    documents = yaml.safe_dump_all(package(params), sort_keys=True, width=1000, allow_unicode=True)
    return HEADER + documents


def write(params: Params, path: Path) -> None:
    """Write the package to a file."""
    storage.write_atomic(path, text(params).encode())


def arguments(params: Params) -> dict[str, Any]:
    """Pipeline inputs `preset` and `params` that carry a project's whole configuration, without what is compiled in.

    One of them is empty: the name of the preset that the configuration is, or else the configuration.

    Raises:
        ConfigError: it is longer than a container can be given, or a URI in it holds credentials.
    """
    from trainer.configure import places, refuse_secrets

    refuse_secrets(places(params))
    whole = params.model_dump(exclude={"cluster"})
    for name in presets.names():
        if validate(parse_yaml(presets.text(name), name)).model_dump(exclude={"cluster"}) == whole:
            return {"preset": name, "params": ""}
    tree = params.model_dump(mode="json", exclude_defaults=True, exclude={"cluster"})
    text = json.dumps(tree, ensure_ascii=False, sort_keys=True)
    size = len(json.dumps(text, ensure_ascii=False).encode())
    if size > MAX_BYTES:
        message = f"params.yaml: {size:,} bytes, of which a pod of Kubeflow takes {MAX_BYTES:,}"
        raise ConfigError(message, "shorten its longest list, such as the choices in tune.space")
    return {"preset": "", "params": text}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep kfp's warnings about its own future off the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
