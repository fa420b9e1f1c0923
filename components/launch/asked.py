"""A stage that is to be run as a job, as the command line or a step of Kubeflow Pipelines asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.launch import names
from trainer import storage
from trainer.artifacts import manifest
from trainer.config import Params

# Of the pods of a job: what they were given.
INPUTS_ANNOTATION = "millrace.dev/inputs"


@dataclass(frozen=True)
class Asked:
    """A stage that is to be run as a job.

    Attributes:
        stage: train or tune.
        params: the configuration.
        inputs: name -> URI.
        outputs: name -> URI.
        name: of the job; empty makes it from the output.
        run: the run that it belongs to, if known.
        nodes: pods; None takes cluster.job.nodes.
        gpus: accelerators of each pod; None takes cluster.gpus_per_node.
        owner: ownerReference of what the job goes away with.
    """

    stage: str
    params: Params
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    name: str = ""
    run: str = ""
    nodes: int | None = None
    gpus: int | None = None
    owner: Mapping[str, Any] | None = None


# The largest file of an artifact that a page of the run may need; weights and data are larger.
_SMALL = 4_000_000


def name_of(asked: Asked) -> str:
    """Name of the job."""
    return asked.name or names.job_name(asked.stage, next(iter(asked.outputs.values())))


def inputs_value(digests: Mapping[str, str]) -> str:
    """The digests of all inputs as one short text."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def small_files(uri: str, folder: Path) -> Path:
    """A local folder with the small files of an artifact: its own if it is mounted, else copies."""
    if not storage.is_remote(uri):
        return storage.local_path(uri)
    folder.mkdir(parents=True, exist_ok=True)
    content = storage.read_bytes(f"{uri}/{storage.MANIFEST}")
    (folder / storage.MANIFEST).write_bytes(content)
    for file in manifest.read(folder, verify=False).files:
        if file.bytes <= _SMALL:
            path = manifest.safe_path(folder, file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(f"{uri}/{file.path}"))
    return folder
