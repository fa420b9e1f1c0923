"""The optimizer's state in the host's memory between steps (`train.offload=optimizer`): it is on the GPU for the update only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError


def install(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have the state come to the device before each update, and go back after it.

    Raises:
        ConfigError: the device is a CPU: the state is in the host's memory already.
    """
    if device.type == "cpu":
        raise ConfigError("train.offload: optimizer, but the device is a CPU", "use train.offload=none")
    hook(optimizer)


def hook(optimizer: torch.optim.Optimizer) -> None:
    """The moving itself, before and after each update."""
    for each in getattr(optimizer, "optimizers", [optimizer]):
        each.register_step_pre_hook(_to_device)
        each.register_step_post_hook(_to_host)


def _to_device(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, state, name, value in _tensors(optimizer):
        state[name] = value.to(parameter.device, non_blocking=True)


def _to_host(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for _parameter, state, name, value in _tensors(optimizer):
        state[name] = value.to("cpu")


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, dict[str, Any], str, Tensor]]:
    """Each tensor of the state with its place; counters, which may be of another device than the weights, stay there."""
    for parameter, state in optimizer.state.items():
        for name, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim():
                yield parameter, state, name, value
