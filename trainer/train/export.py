"""From a checkpoint to a model folder: its best weights, or those of its step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import models, storage
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset, Spec
from trainer.artifacts.publish import building
from trainer.config.model import FAMILIES, Family
from trainer.errors import ConfigError
from trainer.train import inventory
from trainer.train.checkpoint import STATE
from trainer.train.dcp import load_tensors, unreadable
from trainer.train.staging import join

MODEL = "model.json"


def files_of(config: Family, dataset: Dataset) -> dict[str, bytes]:
    """What a checkpoint must hold, besides the tensors, to become a model folder: file name -> content."""
    content = {"model": config.model_dump(mode="json"), "spec": asdict(dataset.spec), "labels": dataset.labels}
    files = {MODEL: json.dumps(content).encode()}
    if dataset.tokenizer_path.is_file():
        files[models.TOKENIZER] = dataset.tokenizer_path.read_bytes()
    return files


def export(uri: str, target: Path, step: int | None = None) -> tuple[int, dict[str, float]]:
    """Write a model folder from a checkpoint, whole or not at all.

    Args:
        uri: folder or URI that holds the checkpoints of one run.
        target: the model folder; one that is there is replaced, and nothing else is.
        step: take the weights of this step; by default the best ones that the newest checkpoint knows.

    Returns:
        The step of the weights and their metrics.

    Raises:
        ArtifactError: no such checkpoint, or it is damaged or cannot be read.
        ConfigError: several runs are there.
        StorageError: the target holds something else, or cannot be written.
    """
    if (target / storage.MANIFEST).is_file() and (kind := manifest.read(target, verify=False).kind) != "model":
        raise ConfigError(f"{target}: holds a {kind}, which a model must not replace", "choose another --out")
    entry = inventory.chosen(uri, step)
    with inventory.verified(entry) as place, building(target) as folder:
        weights, found, metrics = _weights(place, best=step is None)
        about = json.loads((place / MODEL).read_bytes())
        config = FAMILIES[about["model"]["name"]][0].model_validate(about["model"])
        spec = Spec(**about["spec"])
        model = models.build(config, spec)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise unreadable(Path(entry.uri), error) from error
        models.save(folder, model, config, spec, about["labels"], place / models.TOKENIZER, metrics)
        meta = {"task": spec.task, "num_parameters": models.num_parameters(model), "val": metrics, "best_step": found}
        manifest.seal(folder, "model", meta, {"checkpoint": entry.uri})
    return found, metrics


def _weights(place: Path, *, best: bool) -> tuple[dict[str, Tensor], int, dict[str, float]]:
    """Weights, their step and metrics; only these tensors are read."""
    try:
        plain: dict[str, Any] = dict(json.loads((place / STATE).read_bytes())["tree"]["dict"])
        progress = join(plain["progress"], {})
        known = best and bool(plain["best"]["dict"])
    except (ValueError, LookupError, TypeError) as error:
        raise unreadable(place, error) from error
    part = "best" if known else "model"
    tensors = load_tensors(place, lambda name, size, dtype: _empty(name.startswith(f"/{part}/"), size, dtype))
    step = progress["best_step"] if known else progress["step"]
    metrics = progress["best_metrics"] if progress["best_step"] == step else {}
    return join(plain[part], tensors), int(step), metrics


def _empty(wanted: bool, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
    return torch.empty(size, dtype=dtype) if wanted else None
