"""What one of two ranks that divide matrices does, with dropout.

Writes PLACE/rank-N.json: for each case digests of what this rank has dropped, and of what all should hold alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import models, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.parallel import plan as plans
from trainer.parallel.group import current, process_group
from trainer.parallel.plan import local
from trainer.train.state import seed_all

CPU = torch.device("cpu")
SHAPE = ["model.dim=16", "model.layers=2", "model.heads=2", "model.ff=16", "model.dropout=0.4", "parallel.tp=2"]
FAMILIES = {"decoder": ["task.name=lm", "model.kv_heads=2"], "encoder": ["task.name=classify"]}
# Name: (family, words).
CASES = {
    f"{family}{' sequence' * sequence}{' recomputed' * again}": (
        family,
        [
            *SHAPE, *FAMILIES[family], f"parallel.sequence_parallel={sequence}".lower(), "distill.enabled=false",
            f"train.recompute.mode={'blocks' if again else 'none'}",
        ],
    )
    for family in FAMILIES
    for sequence in (False, True)
    for again in (False, True)
}  # fmt: skip


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def outcome(dataset: Dataset, family: str, words: list[str]) -> dict[str, Any]:
    """Digests of one forward and backward pass."""
    params = load(None, [*words, f"model.name={family}"])
    seed_all(0)
    task, model = tasks.build(params, dataset), models.build(params.model, dataset.spec)
    plan = plans.make(params, current(CPU), CPU, model)
    model = plan.prepare(model, dataset.spec)
    seed_all(0, plan.stream)
    found: dict[str, list[str]] = {"embedded": [], "dropped": [], "attended": [], "left": []}

    def note(name: str, tensor: torch.Tensor) -> None:
        found[name].append(digest(tensor))

    def masked(module: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
        note("dropped", made == 0)

    model.dropout.register_forward_hook(lambda module, given, made: note("embedded", made == 0))
    for block in model.blocks:
        block.dropout.register_forward_hook(masked)
    model.norm.register_forward_hook(lambda module, given, made: note("left", made))
    plan.backward(task, model, task.batch("train", np.arange(4)), 1.0, last=True)
    plan.sum_gradients(model.parameters())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = [value for value in gradients.values() if not hasattr(value, "placements")]
    state = torch.get_rng_state()
    if family == "encoder":
        # Of a value of ones, attention gives the sum of the weights that were kept.
        ones = torch.ones(2, 1, 8, 8)
        note("attended", model.blocks[0].attend(ones, ones, ones, None))
    return {**found, "whole": digest(*whole), "own": digest(*map(local, gradients.values())), "state": digest(state)}


def main(place: Path) -> None:
    """Run each case."""
    rank, found = int(os.environ["RANK"]), {}
    with process_group("auto", 30.0, CPU):
        for name, (family, words) in CASES.items():
            found[name] = outcome(Dataset(place / family), family, words)
    (place / f"rank-{rank}.json").write_text(json.dumps(found))
