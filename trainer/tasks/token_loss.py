"""Cross-entropy of language models that never holds the logits of all places: Wijmans et al. 2024, Liger kernel (2024).

The logits of some rows are made, turned into a loss and into gradients, and dropped. It takes the memory of those rows
in place of (places, vocabulary) twice over, and fewer passes over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

IGNORE = -100
# Logits held at a time: on a CPU as much as its caches, on a GPU enough to fill it.
ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}


def token_loss(hidden: Tensor, weight: Tensor | None, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of hidden @ weight' against the targets, summed over them; float32.

    Args:
        hidden: (batch, length, dim); logits (batch, length, vocabulary) where there is no `weight`.
        weight: (vocabulary, dim).
        targets: int64 (batch, length); IGNORE counts for nothing.
        smoothing: share of the target that is spread over all tokens.
    """
    flat, targets = hidden.flatten(0, 1), targets.flatten()
    if weight is None or torch.compiler.is_compiling():
        logits = flat if weight is None else flat @ weight.t()
        return cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE, label_smoothing=smoothing)
    loss: Tensor = _TokenLoss.apply(flat, weight, targets, smoothing)
    return loss


class _TokenLoss(torch.autograd.Function):
    """The gradients are made beside the loss: one product less than in a backward pass that makes the logits anew."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        device, types = hidden.device.type, (hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros(weight.shape, dtype=types[1], device=hidden.device) if needs_weight else None
        loss = torch.zeros((), device=hidden.device)
        rows = max(1, ELEMENTS.get(device, ELEMENTS["cuda"]) // len(weight))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), rows):
                part = hidden[start : start + rows]
                kept, gradient = _part(part @ weight.t(), targets[start : start + rows], smoothing)
                loss += kept
                if of_hidden is not None:
                    of_hidden[start : start + rows] = gradient.to(weight.dtype) @ weight
                if of_weight is not None:
                    of_weight += gradient.to(part.dtype).t() @ part
        ctx.save_for_backward(None if of_hidden is None else of_hidden.to(types[0]), of_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        (by,) = gradients
        scaled = (None if gradient is None else gradient * by for gradient in (of_hidden, of_weight))
        return next(scaled), next(scaled), None, None


def _part(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss of some rows of logits, and its gradient by them, float32."""
    logs = torch.log_softmax(logits, -1, dtype=torch.float32)
    counted = (targets != IGNORE).unsqueeze(1)
    place = targets.clamp(min=0).unsqueeze(1)
    losses = logs.gather(1, place).neg_()
    if smoothing:
        losses.mul_(1 - smoothing).sub_(logs.mean(-1, keepdim=True), alpha=smoothing)
    loss = losses.masked_fill_(~counted, 0.0).sum()
    gradient = logs.exp_()
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    gradient.scatter_add_(1, place, torch.full_like(losses, smoothing - 1))
    return loss, gradient.masked_fill_(~counted, 0.0)
