"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for embeddings, output layers and the rest.

Momentum with Nesterov's look-ahead, then the nearest half-orthogonal matrix by five Newton-Schulz iterations, with
decoupled decay. A matrix of rows x columns moves by `train.muon_lr` x sqrt(max(1, rows / columns)), as in Jordan's own
code and torch.optim.Muon. Matrices of one shape are stacked, so that few large products do what many small ones would.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Train
from trainer.train.optimizers import Named, Own, adamw, local

# Matrices that are lookups or classifiers: their rows are not directions that an orthogonal update should mix.
ADAMW_NAMES = ("embedding", "position", "table", "bigrams", "output")
# Of the quintic iteration, and the number of iterations (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Together(torch.optim.Optimizer):
    """Several optimizers behind the interface of one, with one flat state: what each does is its own affair."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        groups = [{**group, "member": i} for i, each in enumerate(optimizers) for group in each.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step each optimizer."""
        for index, each in enumerate(self.optimizers):
            # Groups may have been divided, and loading a state puts others in their place.
            each.param_groups = [group for group in self.param_groups if group["member"] == index]
            each.state = self.state
            each.step()


class Muon(Own):
    """For matrices; its state is one momentum."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Step along the orthogonalised momentum, stacks of one shape at a time."""
        momentum = local(self.buffers(parameters, "momentum_buffer"))
        gradients = local(parameter.grad for parameter in parameters)
        torch._foreach_lerp_(momentum, gradients, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momentum, group["momentum"])
        torch._foreach_mul_(local(parameters), 1.0 - group["lr"] * group["weight_decay"])
        shapes: dict[torch.Size, list[int]] = {}
        for index, parameter in enumerate(parameters):
            shapes.setdefault(parameter.shape, []).append(index)
        for shape, members in shapes.items():
            stack = torch.stack([whole(ahead[index], parameters[index]) for index in members])
            change = orthogonal(stack, precision(stack.device))
            rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            shards = [shard(each, parameters[index]) for index, each in zip(members, change, strict=True)]
            torch._foreach_add_(local(parameters[index] for index in members), shards, alpha=-rate)


def orthogonal(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (number, rows, columns) of float32 with their singular values brought near 1, computed in `dtype`."""
    a, b, c = COEFFICIENTS
    x = stack.mT if stack.shape[1] > stack.shape[2] else stack
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if stack.shape[1] > stack.shape[2] else x).to(stack.dtype)


@cache
def precision(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on CPUs with instructions for it (a third of the time there); else float32."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def whole(values: Tensor, parameter: Any) -> Tensor:
    """The whole of a matrix of which this rank holds the shard `values`, sharded as the parameter is."""
    if not hasattr(parameter, "_local_tensor"):
        return values
    from torch.distributed.tensor import DTensor

    parts = DTensor.from_local(
        values, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )  # fmt: skip
    full: Tensor = parts.full_tensor()
    return full


def shard(values: Tensor, parameter: Any) -> Tensor:
    """This rank's shard of a whole matrix that every rank has."""
    if not hasattr(parameter, "_local_tensor"):
        return values
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return getattr(placed, "_local_tensor", placed)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: a matrix inside the network."""
    return parameter.ndim == 2 and not any(part in ADAMW_NAMES for part in name.split("."))


def muon(named: Named, train: Train) -> torch.optim.Optimizer:
    """Muon at `train.muon_lr` for the matrices, AdamW at `train.lr` for the rest."""
    pairs = list(named)
    matrices = [parameter for name, parameter in pairs if is_matrix(name, parameter)]
    rest = [(name, parameter) for name, parameter in pairs if not is_matrix(name, parameter)]
    settings = {"lr": train.muon_lr, "momentum": train.momentum, "weight_decay": train.weight_decay}
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices, settings)] if matrices else []
    return Together([*optimizers, *([adamw(rest, train)] if rest else [])])
