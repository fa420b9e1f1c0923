"""One rank of a group that trains with each optimizer: `run_ranks(optimizer_ranks.main, place)`.

Reads PLACE/data, writes PLACE/rank-N.json: losses of small trainings, and how far sharded steps are from steps on whole tensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trainer import models, plugins, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config import Train
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.parallel.group import process_group
from trainer.train import optimizers, sophia
from trainer.train.fit import fit
from trainer.train.state import seed_all

WORDS = [
    "task.name=classify", "model.name=encoder", "model.dim=16", "model.layers=2", "model.ff=16", "model.heads=2",
    "model.dropout=0.0", "distill.enabled=false", "train.threads=1", "train.max_steps=6", "train.log_every=1",
    "train.lr=0.01", "train.sophia.every=2", "train.galore.rank=4", "train.layer_decay=0.7",
    'train.groups=[{"match": "position.*", "lr_scale": 0}]',
]  # fmt: skip


def losses(dataset: Dataset, optimizer: str, batch_size: int) -> list[float]:
    """The losses of a few steps."""
    params = load(None, [*WORDS, f"train.optimizer={optimizer}", f"train.batch_size={batch_size}"])
    seed_all(params.train.seed)
    fitted = fit(params, tasks.build(params, dataset), models.build(params.model, dataset.spec))
    return [row["train_loss"] for row in fitted.history if "train_loss" in row]


def stepped(optimizer: str, mesh=None) -> dict[str, torch.Tensor]:
    """Whole values after steps with given gradients, of whole or of sharded parameters; rows do not divide evenly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 5))

    def placed(values: torch.Tensor) -> torch.Tensor:
        return values if mesh is None else distribute_tensor(values, mesh, [Shard(0)])

    for layer in model:
        for name, value in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(placed(value.detach())))
    built = optimizers.build(model, Train(optimizer=optimizer, lr=0.05, weight_decay=0.1, betas=(0.8, 0.9)))
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = placed(torch.randn(parameter.shape))
        if isinstance(built, sophia.Sophia):
            built.estimate(3.0, 0)
        built.step()
    for state in built.state.values():
        # A moment of a parameter's shape is sharded as the parameter is, so that a checkpoint can hold it whole.
        assert all(isinstance(value, DTensor) == bool(mesh) for value in state.values() if value.ndim), optimizer
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.named_parameters()
    }


def refused(optimizer: str, mesh) -> str:
    """What is said of an optimizer that cannot work on shards."""
    try:
        stepped(optimizer, mesh)
    except ConfigError as error:
        return error.message
    return ""


def main(place: Path) -> None:
    """Train with each optimizer."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dataset = Dataset(place / "data")
    found: dict = {"losses": {}, "apart": {}, "refused": {}}
    with process_group("auto", 60.0, torch.device("cpu")):
        for name in plugins.OPTIMIZERS:
            found["losses"][name] = losses(dataset, name, 4)
        mesh = init_device_mesh("cpu", (2,))
        for name in sorted(plugins.SHARDABLE):
            whole, parts = stepped(name), stepped(name, mesh)
            found["apart"][name] = max(float((whole[key] - parts[key]).abs().max()) for key in whole)
        for name in sorted(set(plugins.OPTIMIZERS) - plugins.SHARDABLE):
            found["refused"][name] = refused(name, mesh)
    (place / f"rank-{rank}.json").write_text(json.dumps(found))
