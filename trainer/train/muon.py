"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for embeddings, output layers and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.config import Train
from trainer.train.optimizers import Named, adamw

# Matrices that are lookups or classifiers: their rows are not directions that an orthogonal update should mix.
ADAMW_NAMES = ("embedding", "position", "table", "output")


class Together(torch.optim.Optimizer):
    """Several optimizers behind the interface of one: their groups side by side, their states in one state dict."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        # The very same group objects, so that a rate set here is the rate used there.
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step each optimizer."""
        for each in self.optimizers:
            each.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimizer."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the state of each optimizer."""
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter: a matrix inside the network."""
    return parameter.ndim == 2 and not any(part in ADAMW_NAMES for part in name.split("."))


def muon(named: Named, train: Train) -> torch.optim.Optimizer:
    """Muon at `train.muon_lr` for the matrices, AdamW at `train.lr` for the rest."""
    pairs = list(named)
    rest = [(name, parameter) for name, parameter in pairs if not is_matrix(name, parameter)]
    matrices = [parameter for name, parameter in pairs if is_matrix(name, parameter)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        decay = train.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=train.muon_lr, weight_decay=decay, momentum=train.momentum))
    if rest:
        optimizers.append(adamw(rest, train))
    return Together(optimizers)
