"""Lion (Chen et al. 2023): the sign of an interpolated momentum.

Every element moves by the rate itself, so the rate is a third to a tenth of AdamW's, and the decay as much larger; the
paper's betas are 0.9 and 0.99.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import Train
from trainer.train.optimizers import Named, Own, groups, local


class Lion(Own):
    """Elementwise; its state is one momentum, half of Adam's."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Decay, step by the sign of the interpolation with beta 1, then update the momentum with beta 2."""
        beta1, beta2 = group["betas"]
        momentum = local(self.buffers(parameters, "exp_avg"))
        gradients = local(parameter.grad for parameter in parameters)
        values = local(parameters)
        torch._foreach_mul_(values, 1.0 - group["lr"] * group["weight_decay"])
        direction = torch._foreach_lerp(momentum, gradients, 1.0 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_add_(values, direction, alpha=-group["lr"])
        torch._foreach_lerp_(momentum, gradients, 1.0 - beta2)


def lion(named: Named, train: Train) -> torch.optim.Optimizer:
    """Lion at `train.lr` with `train.betas`."""
    return Lion(groups(named, train.weight_decay), {"lr": train.lr, "betas": train.betas})
