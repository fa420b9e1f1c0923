"""Optimizers: each is build(named_parameters, train) -> torch.optim.Optimizer.

To add one, write such a function in a file of its own and enter it in `trainer.plugins.OPTIMIZERS`. Weight decay is
decoupled and for matrices only. The peak rate of each parameter group is kept as `initial_lr`; the schedule multiplies it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer import plugins
from trainer.config import Train
from trainer.errors import ConfigError
from trainer.train import rates

Named = Iterable[tuple[str, nn.Parameter]]


def build(model: nn.Module, train: Train, names: Sequence[str] = ()) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, for the trainable parameters of a model.

    Parameters to which `train.groups` gives a rate of 0 are frozen in the model, and left out.

    Args:
        model: whole, or this rank's part of it.
        train: the section.
        names: all parameters of the whole model, in its order, where `model` is but a part.

    Raises:
        ConfigError: `train.groups` or `train.layer_decay` does not fit the model, a library is missing, or the optimizer
            cannot work on parameters that are divided among ranks.
    """
    everything = list(model.named_parameters())
    if train.optimizer not in plugins.SHARDABLE and any(hasattr(each, "_local_tensor") for _, each in everything):
        raise ConfigError(
            f"train.optimizer: {train.optimizer} needs whole parameters, but section parallel divides them among ranks",
            f"use one of {', '.join(sorted(plugins.SHARDABLE))}, or parallel.zero=0 and parallel.tp=1",
        )
    found = rates.settings(names or [name for name, _ in everything], train)
    rates.freeze(model, found)
    named = [(name, parameter) for name, parameter in everything if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = plugins.load(plugins.OPTIMIZERS[train.optimizer])(named, train)
    rates.divide(optimizer, {parameter: found[name] for name, parameter in named})
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and higher, with decay; biases, norms and gains, without."""
    parameters = [parameter for _, parameter in named]
    parts = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [part for part in parts if part["params"]]


class _WithoutCompiler(torch.optim.Optimizer):
    """A mixin whose step is the optimizer's own, without the wrapper that imports torch's compiler (2 s of a cold start).

    That wrapper only serves differentiable and compiled optimizers, which these are not.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        # Kernels over lists of tensors take those of one mesh only.
        self.param_groups = [{**each, "params": part} for each in groups for part in by_mesh(each["params"])]
        try:
            inspect.unwrap(super().step.__func__)(self)  # type: ignore[attr-defined]
        finally:
            self.param_groups = groups


def by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are divided along the same axes, together; those that are not divided are one such part."""
    parts: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        parts.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(parts.values())


class _SGD(_WithoutCompiler, torch.optim.SGD):
    pass


class _Adam(_WithoutCompiler, torch.optim.Adam):
    pass


class _AdamW(_WithoutCompiler, torch.optim.AdamW):
    pass


class _Adafactor(_WithoutCompiler, torch.optim.Adafactor):
    pass


class Own(torch.optim.Optimizer, ABC):
    """An optimizer of ours: `update` is called for each parameter group, with the parameters that have a gradient."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(group, parameters)

    @abstractmethod
    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Change the parameters of a group, all of which have gradients, and their state."""

    def buffers(self, parameters: list[nn.Parameter], name: str) -> list[Tensor]:
        """The state `name` of each parameter, zero at first: of the parameter's shape, and sharded as it is."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [self.state[parameter][name] for parameter in parameters]


def local(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """This rank's shard of each tensor (a view of it), for what works element by element."""
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if tensor is not None]


def sgd(named: Named, train: Train) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum where `train.momentum` is not 0."""
    parts = groups(named, train.weight_decay)
    return _SGD(parts, lr=train.lr, momentum=train.momentum, nesterov=train.momentum > 0, foreach=True)


def adam(named: Named, train: Train) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015); its weight decay is an L2 penalty inside the gradient."""
    parts = groups(named, train.weight_decay)
    return _Adam(parts, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def adamw(named: Named, train: Train) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): decoupled weight decay."""
    parts = groups(named, train.weight_decay)
    return _AdamW(parts, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def adafactor(named: Named, train: Train) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018): row and column means in place of the second moment, no first moment.

    The step is relative to the size of a parameter: `train.lr`, at most 1 / sqrt(step), times the root mean square of its
    values. The decay of the second moment is 1 - step^-0.8; `train.betas` and `train.eps` are not used.
    """
    return _Adafactor(groups(named, train.weight_decay), lr=train.lr, foreach=True)
