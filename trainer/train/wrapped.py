"""What is put around the blocks of a model for training, in place, so that the names of parameters stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.config import Train


def apply(model: nn.Module, train: Train) -> None:
    """Recompute and compile as `train.recompute` and `train.compile` say: after tensor parallelism, before FSDP.

    Raises:
        ConfigError: `train.recompute` asks for blocks, and the model has none.
    """
    if train.recompute.mode != "none":
        from trainer.train import recompute

        recompute.apply(model, train.recompute)
    if train.compile is True:
        compile_blocks(model)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of a model, or all of it where it has none: like blocks share one compilation.

    Lengths and last batches differ: after the second size one compilation serves them all. Evaluation goes on without: it
    would be compiled anew, for want of gradients.
    """
    blocks = getattr(model, "blocks", None)
    for module in blocks if isinstance(blocks, nn.ModuleList) else [model]:
        if module is not None:  # another stage of a pipeline has it
            module.forward = partial(_forward, torch.compile(module.forward), module.forward)


def _forward(compiled: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)


def undo(model: nn.Module) -> None:
    """The model as it was before `apply`."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
