"""Optimizers: each is build(named_parameters, train) -> torch.optim.Optimizer.

To add one, write such a function in a file of its own and enter it in `trainer.plugins.OPTIMIZERS`. Weight decay is for
matrices only. The peak rate of each parameter group is kept as `initial_lr`; the schedule multiplies it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer import plugins
from trainer.config import Train

Named = Iterable[tuple[str, nn.Parameter]]


def build(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, for the trainable parameters of a model."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = plugins.load(plugins.OPTIMIZERS[train.optimizer])(named, train)
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
        inspect.unwrap(super().step.__func__)(self)  # type: ignore[attr-defined]


class _SGD(_WithoutCompiler, torch.optim.SGD):
    pass


class _Adam(_WithoutCompiler, torch.optim.Adam):
    pass


class _AdamW(_WithoutCompiler, torch.optim.AdamW):
    pass


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
