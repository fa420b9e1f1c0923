"""Norms by block around an update: of gradients, of weights, and of the change of the weights over that of the weights.

A block is what a parameter's name begins with: `blocks.3`, `embedding`, `output`. An update ratio of about 1e-3 is usual;
one that is far from those of other blocks tells of a rate that does not suit the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.parallel.plan import Plan, local

_BLOCK = re.compile(r"[^.]+(\.\d+)?")


@contextmanager
def measured(model: nn.Module, plan: Plan, scale: float, put: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Around an update of the weights: what it did to each block, over all ranks. Every rank calls it together.

    Until the end, a copy of this rank's weights is in the host's memory.

    Args:
        model: as `plan` divides it, with the gradients of the step.
        plan: says whose part of a parameter counts.
        scale: factor that the gradients still have.
        put: gets `grad_norm/BLOCK`, `weight_norm/BLOCK` (before the update) and, where that is not 0, `update_ratio/BLOCK`.
    """
    blocks = list(dict.fromkeys(map(block_of, plan.names or [name for name, _ in model.named_parameters()])))
    mine = [(blocks.index(block_of(name)), p) for name, p in model.named_parameters() if plan.owns(name, p)]
    squares = torch.zeros(3, len(blocks), dtype=torch.float64)
    _add(squares[0], [(block, local(p.grad)) for block, p in mine if p.grad is not None])
    _add(squares[1], [(block, local(p).detach()) for block, p in mine])
    before = [(block, p, local(p).detach().to("cpu", copy=True)) for block, p in mine if p.requires_grad]
    yield
    _add(squares[2], [(block, old.sub_(local(p).detach().cpu())) for block, p, old in before])
    gradients, weights, changes = plan.ranks.sum(squares).sqrt().tolist()
    figures = {f"grad_norm/{block}": norm / scale for block, norm in zip(blocks, gradients, strict=True)}
    figures |= {f"weight_norm/{block}": norm for block, norm in zip(blocks, weights, strict=True)}
    for block, change, weight in zip(blocks, changes, weights, strict=True):
        if weight:
            figures[f"update_ratio/{block}"] = change / weight
    put(figures)


def block_of(name: str) -> str:
    """The block to which a parameter of this name belongs."""
    found = _BLOCK.match(name)
    return found[0] if found else name


def _add(squares: Tensor, tensors: Iterable[tuple[int, Tensor]]) -> None:
    """Add the square of each tensor's norm to that of its block."""
    kept = [(block, tensor) for block, tensor in tensors if tensor.numel()]
    if kept:
        norms = torch.stack(torch._foreach_norm([tensor for _, tensor in kept])).double().cpu()
        squares.index_add_(0, torch.tensor([block for block, _ in kept]), norms.square())
