"""AdamW with 8-bit moments (Dettmers et al. 2022), quantised in blocks of 256 by torchao's kernels.

The codes and scales are plain tensors, so that a checkpoint holds them like any other state. Parameters whose number of
values is below 4,096 or no multiple of 256 keep moments of their own type, as in torchao.optim.AdamW8bit.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Train
from trainer.errors import ConfigError
from trainer.train.optimizers import Named, Own, groups

BLOCK = 256
SMALLEST = 4096


class AdamW8bit(Own):
    """Elementwise within blocks; its state is two moments in a byte each, and a scale for each block."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """AdamW's step with moments that are read from 8 bits and written back to them."""
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            state["step"] += 1
            count = int(state["step"])
            gradient = parameter.grad.float()
            first = self.read(parameter, "exp_avg").lerp_(gradient, 1.0 - beta1)
            second = self.read(parameter, "exp_avg_sq").lerp_(gradient.square(), 1.0 - beta2)
            self.write(parameter, "exp_avg", first)
            self.write(parameter, "exp_avg_sq", second)
            spread = second.sqrt_().div_((1.0 - beta2**count) ** 0.5).add_(group["eps"])
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(
                first.to(parameter.dtype), spread.to(parameter.dtype), value=-group["lr"] / (1.0 - beta1**count)
            )

    def read(self, parameter: nn.Parameter, name: str) -> Tensor:
        """A moment as float32; zeros before the first step."""
        state = self.state[parameter]
        if name not in state:
            return torch.zeros_like(parameter, dtype=torch.float32)
        if f"{name}_scale" not in state:
            plain: Tensor = state[name].float()
            return plain
        levels = _levels(name == "exp_avg", parameter.device)
        # A state that was loaded has the parameter's type; the codes are whole numbers all the same.
        moment: Tensor = _kernels().dequant_with_qmap(state[name].to(torch.uint8), levels, state[f"{name}_scale"])
        return moment

    def write(self, parameter: nn.Parameter, name: str, moment: Tensor) -> None:
        """Keep a moment: as codes and scales, or as it is if it is small."""
        state = self.state[parameter]
        if moment.numel() < SMALLEST or moment.numel() % BLOCK:
            state[name] = moment.clone()
            return
        scaled, state[f"{name}_scale"] = _kernels().scale_tensor(moment, BLOCK)
        state[name] = _kernels().quantize_8bit_with_qmap(scaled, _levels(name == "exp_avg", parameter.device))


def _kernels() -> ModuleType:
    from torchao.optim import quant_utils

    return quant_utils  # type: ignore[no-any-return]


@cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that a code stands for, float32."""
    return torch.tensor(_kernels().create_dynamic_map(signed=signed), dtype=torch.float32, device=device)


def adamw8bit(named: Named, train: Train) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments at `train.lr`.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        _kernels()
    except ImportError:
        raise ConfigError(
            "train.optimizer: adamw8bit needs torchao, which is not installed",
            "pip install 'millrace[compress]', or use train.optimizer=adamw",
        ) from None
    return AdamW8bit(groups(named, train.weight_decay), {"lr": train.lr, "betas": train.betas, "eps": train.eps})
