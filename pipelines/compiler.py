"""The pipeline as the package that Kubeflow Pipelines takes: `millrace compile`.

A package is YAML: the pipeline's intermediate representation, and as a second document what Kubernetes is told of
each task. It holds no parameters of the training: those are inputs of the pipeline.
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

from trainer import storage
from trainer.config import Params

HEADER = "# The training pipeline for Kubeflow Pipelines 2.15 to 2.17, made by `millrace compile`.\n"


def package(params: Params) -> list[dict[str, Any]]:
    """The documents of the package: the pipeline spec and the platform spec."""
    with quiet():
        from kfp import compiler

        from pipelines.training import training

        with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
            path = Path(folder) / "package.yaml"
            compiler.Compiler().compile(training(params), str(path))
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
    """Pipeline inputs that carry a project's whole configuration, without what is compiled in."""
    tree = params.model_dump(mode="json", exclude_defaults=True, exclude={"cluster"})
    return {"params": json.dumps(tree, ensure_ascii=False, sort_keys=True)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep kfp's warnings about its own future off the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
