"""Rates and weight decay of single parameters: layer-wise decay and groups by name, for whatever optimizer.

`settings` says what each parameter gets, `freeze` takes those with a rate of 0 out of training, and `divide` splits an
optimizer's parameter groups so that each has one rate and one decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from trainer.config import Train
from trainer.config.names import nearest
from trainer.errors import ConfigError

BLOCKS = "blocks"


@dataclass(frozen=True)
class Setting:
    """What a parameter gets: a factor of the peak rate, and a decay where it is not `train.weight_decay`."""

    lr_scale: float = 1.0
    weight_decay: float | None = None


def settings(names: Sequence[str], train: Train) -> dict[str, Setting]:
    """The setting of each parameter by `train.layer_decay` and `train.groups`.

    Args:
        names: all parameters of the whole model, in its order.
        train: the section.

    Raises:
        ConfigError: a pattern matches no name, or layers are to be told apart where there are no blocks.
    """
    scales = layer_scales(names, train.layer_decay)
    found = {name: Setting(scale) for name, scale in scales.items()}
    for index, group in reversed(list(enumerate(train.groups))):
        matched = [name for name in names if fnmatchcase(name, group.match)]
        if not matched:
            near = nearest(group.match, names, limit=8)
            raise ConfigError(
                f"train.groups.{index}.match: {group.match!r} matches no parameter of the model; {near}",
                "correct the pattern: * stands for any characters, ? for one",
            )
        # From the last to the first, so that the first that matches has the last word.
        for name in matched:
            found[name] = Setting(scales[name] * group.lr_scale, group.weight_decay)
    return found


def layer_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """Factor of the rate of each parameter: `decay` to the power of its distance from the output.

    What comes before the blocks (embeddings) is layer 0, the blocks are layers 1 to L, and what comes after them (the
    last norm, the output) is layer L + 1, as in ULMFiT (Howard and Ruder 2018) and BEiT (Bao et al. 2022).

    Raises:
        ConfigError: `decay` is not 1, and no parameter belongs to a numbered block.
    """
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    blocks = {name: int(name.split(".")[1]) for name in names if name.startswith(f"{BLOCKS}.")}
    if not blocks:
        raise ConfigError(
            f"train.layer_decay: {decay:g}, but this model has no blocks whose rates could differ",
            "use train.layer_decay=1, train.groups, or a model with blocks: encoder, decoder or vit",
        )
    top = max(blocks.values()) + 2
    scales: dict[str, float] = {}
    layer = 0
    for name in names:
        if name in blocks:
            layer = top
        scales[name] = decay ** (top - (blocks[name] + 1 if name in blocks else layer))
    return scales


def freeze(model: nn.Module, found: Mapping[str, Setting]) -> None:
    """Take parameters whose rate is 0 out of training: they get neither gradients nor state.

    Raises:
        ConfigError: nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        if found[name].lr_scale == 0.0:
            parameter.requires_grad_(False)
    if not any(setting.lr_scale for setting in found.values()):
        raise ConfigError("train.groups: every parameter has a rate of 0", "leave at least one that is trained")


def divide(optimizer: torch.optim.Optimizer, of: Mapping[nn.Parameter, Setting]) -> None:
    """Split the parameter groups of a new optimizer by setting; the highest rate comes last in each."""
    divided = []
    for group in optimizer.param_groups:
        parts: dict[Setting, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(of[parameter], []).append(parameter)
        for setting in sorted(parts, key=lambda each: each.lr_scale):
            part = {**group, "params": parts[setting], "lr": group["lr"] * setting.lr_scale}
            if setting.weight_decay is not None:
                part["weight_decay"] = setting.weight_decay
            divided.append(part)
    optimizer.param_groups[:] = divided
