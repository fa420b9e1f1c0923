"""GaLore (Zhao et al. 2024): AdamW whose moments live in a subspace of each matrix's gradient.

The gradient of a matrix (rows x columns) is projected on the leading singular vectors of its shorter side, found anew
every `train.galore.every` steps; Adam's moments are of the projection, and so take `rank` numbers where AdamW's take the
shorter side's. Matrices that are no larger than `rank`, embeddings, output layers and vectors go with plain AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Train
from trainer.train.muon import Together, is_matrix
from trainer.train.optimizers import Named, Own, adamw


class GaLore(Own):
    """For matrices; the state is the projection, two moments of it, and the number of steps."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Adam's step in each matrix's subspace, projected back and scaled; decoupled decay."""
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            assert parameter.grad is not None
            gradient, state = parameter.grad, self.state[parameter]
            # The shorter side first.
            turned = gradient.mT if gradient.shape[0] > gradient.shape[1] else gradient
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            if int(state["step"]) % group["every"] == 0:
                state["projection"] = leading(turned, group["rank"]).to(parameter.dtype)
            low = state["projection"].mT @ turned
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(low)
            state["step"] += 1
            state["exp_avg"].lerp_(low, 1.0 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1.0 - beta2)
            count = int(state["step"])
            spread = (state["exp_avg_sq"] / (1.0 - beta2**count)).sqrt_().add_(group["eps"])
            change = state["projection"] @ (state["exp_avg"] / (1.0 - beta1**count) / spread)
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            back = change.mT if gradient.shape[0] > gradient.shape[1] else change
            parameter.add_(back, alpha=-group["lr"] * group["scale"])


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors (rows, rank) of a matrix with no more rows than columns, float32.

    Each has its largest element above 0: the moments, which stay when the subspace is found anew, would otherwise meet
    vectors that are the old ones but for their sign.
    """
    vectors: Tensor = torch.linalg.svd(matrix.float(), full_matrices=False).U[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).contiguous()


def galore(named: Named, train: Train) -> torch.optim.Optimizer:
    """GaLore for the matrices inside the network, AdamW for the rest, both at `train.lr`."""
    pairs = list(named)
    settings = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    chosen = [(name, p) for name, p in pairs if is_matrix(name, p) and min(p.shape) > train.galore.rank]
    rest = [pair for pair in pairs if pair not in chosen]
    low = {**settings, "rank": train.galore.rank, "every": train.galore.every, "scale": train.galore.scale}
    optimizers = [GaLore([p for _, p in chosen], low)] if chosen else []
    return Together([*optimizers, *([adamw(rest, train)] if rest else [])])
