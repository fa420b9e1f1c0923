"""Dropout of ranks that divide each matrix: alike in what all of them hold, each its own in what each has a part of.

Ranks along tp have the same generators, so that the streams that they all hold stay equal. Heads, and a part of the
sequence, are each rank's own: with the same masks there, places far apart would be dropped together. Megatron-LM keeps a
second generator for that (Shoeybi et al. 2019, appendix B.2); here its seed is drawn from the common one, so that
recomputed activations and resumed runs draw the same again without more state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.models import encoder

Layer = Callable[..., Tensor]


def divide_masks(block: Any, rank: int, sequence: bool, compiled: bool) -> None:
    """Have a block draw masks of its own where it has a part.

    Args:
        block: divided along tp; its weights may be on the meta device.
        rank: its rank's place along tp.
        sequence: whether what lies between its matrices is divided along the sequence.
        compiled: whether it will be compiled; what is drawn here then stays outside.
    """
    run: Layer = torch.compiler.disable(_apart) if compiled else _apart  # type: ignore[no-untyped-call]
    if isinstance(block, encoder.Block):
        block.attend = partial(run, rank, block.dropout, block.attend)  # type: ignore[method-assign]
    if sequence:
        block.dropout.forward = partial(run, rank, block.dropout, block.dropout.forward)


def _apart(rank: int, dropout: torch.nn.Dropout, layer: Layer, x: Tensor, *rest: Any) -> Tensor:
    """What a layer makes of `x` with random numbers of this rank's; the generators go on alike on all ranks."""
    if not (dropout.training and dropout.p):
        return layer(x, *rest)
    seed = int(torch.randint(1 << 62, ()))
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed + rank)
        return layer(x, *rest)
