"""Magnitude pruning on the cubic schedule (Zhu and Gupta 2017, "To prune, or not to prune").

Between `begin` and `end` (shares of all steps) the share of zeros rises as target x (1 - (1 - t)^3): fast at first,
when much can go, slowly at last. Weights once pruned stay zero to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config.stages import Prune

if TYPE_CHECKING:
    from torch import Tensor, nn


def sparsity_at(config: Prune, step: int, total: int) -> float:
    """Share of zeros wanted after `step` of `total` steps."""
    begin, end = config.begin * total, config.end * total
    if step <= begin:
        return 0.0
    progress = min(1.0, (step - begin) / (end - begin))
    return config.target * (1.0 - (1.0 - progress) ** 3)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of a model; biases, norms and gains are never pruned."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}


def sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights that may be pruned."""
    weights = list(prunable(model).values())
    count = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / max(count, 1)


class Pruner:
    """Give `on_step` to `fit`: it prunes on the schedule and holds what is pruned at zero.

    It keeps no state that a checkpoint would have to save: what is exactly zero when training begins, or goes on from
    a checkpoint, is held at zero.
    """

    def __init__(self, config: Prune, model: nn.Module) -> None:
        self.config = config
        self.masks: dict[str, Tensor] = {}
        self._hook = model.register_forward_pre_hook(self._before_first_step)

    def on_step(self, step: int, total: int, model: nn.Module) -> None:
        """Called after optimizer step `step` (from 1) of `total`."""
        import torch

        wanted = sparsity_at(self.config, step, total)
        due = step % self.config.every == 0 or step >= self.config.end * total
        with torch.no_grad():
            for name, weight in prunable(model).items():
                if name in self.masks:
                    weight.mul_(self.masks[name])
            if due and wanted > self._share():
                self._prune(prunable(model), wanted)

    def close(self) -> None:
        """Let go of the model."""
        self._hook.remove()

    def _before_first_step(self, model: nn.Module, _: object) -> None:
        if not self.masks:
            self.masks = {name: weight.detach() != 0 for name, weight in prunable(model).items()}

    def _share(self) -> float:
        count = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / max(count, 1)

    def _prune(self, weights: dict[str, nn.Parameter], wanted: float) -> None:
        """Zero the smallest weights, of all matrices together (global) or of each by itself (tensor)."""
        import torch

        groups = [[name] for name in weights] if self.config.scope == "tensor" else [list(weights)]
        for names in groups:
            sizes = torch.cat([weights[name].detach().abs().flatten() for name in names])
            count = round(wanted * len(sizes))
            if not count:
                continue
            # The exact number, ties by position: a threshold would take all of equal weights or none.
            order = torch.argsort(sizes, stable=True)[:count]
            keep = torch.ones_like(sizes, dtype=torch.bool)
            keep[order] = False
            for name, part in zip(names, torch.split(keep, [weights[name].numel() for name in names]), strict=True):
                self.masks[name] = part.view_as(weights[name])
                weights[name].mul_(self.masks[name])
