"""An optimizer's state by the names of parameters: it fits whatever the plan, the order and the groups of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each parameter by name, its state: key -> value. DTensors remain what they are."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def set_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, found: dict[str, dict[str, Any]]) -> None:
    """Put back what `named_state` gave, under this plan or another.

    Tensors keep the type in which they were saved. One that has another shape than its divided parameter is whole on each
    rank, and stays so.
    """
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if name in found:
            optimizer.state[parameter] = {key: _beside(parameter, value) for key, value in found[name].items()}


def _beside(parameter: Tensor, value: Any) -> Any:
    """A value of a parameter's state where the parameter is: on its device, on its mesh."""
    if not isinstance(value, Tensor) or hasattr(value, "placements"):
        return value
    moved = value.to(parameter.device)
    mesh = getattr(parameter, "device_mesh", None)
    if value.ndim == 0 or mesh is None:
        return moved
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(moved, mesh, [Replicate()] * mesh.ndim, run_check=False)
