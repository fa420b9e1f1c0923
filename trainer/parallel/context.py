"""Context parallel: the ranks along cp divide each sequence (Dubey et al. 2024, Llama 3, section 3.3.2).

A sequence is cut into 2 x cp slices, of which rank r has slice r and slice 2 x cp - 1 - r: an early and a late one, so that
under a causal mask all ranks have as much to do. All but attention works on places by themselves. In attention the keys and
values of all ranks are gathered, and each slice of queries attends to those before its end; backward, their gradients are
summed and divided. Gathering costs less than it seems where few key heads serve many query heads, takes any mask, and its
sums do not depend on the order in which parts arrive, as those of attention over a ring do (Liu et al. 2024).

To divide another family, enter what sets its positions and attention in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trainer.artifacts.dataset import Spec
from trainer.errors import ConfigError
from trainer.models.decoder import Decoder
from trainer.models.ops import causal_attention
from trainer.parallel.group import subgroup
from trainer.tasks.base import Batch


class Context:
    """This rank's places of each sequence.

    Args:
        mesh: all ranks; those along cp are next to each other along its axis dp_shard.
        size: ranks along cp.
        timeout_s: after which a collective gives up.
    """

    def __init__(self, mesh: DeviceMesh, size: int, timeout_s: float) -> None:
        along = mesh.mesh_dim_names.index("dp_shard") if mesh.mesh_dim_names else 0
        groups = mesh.mesh.movedim(along, -1).reshape(-1, size).tolist()
        self.mesh = DeviceMesh.from_group(subgroup(groups, timeout_s), mesh.device_type, mesh_dim_names=("cp",))
        self.size, self.rank = size, self.mesh.get_local_rank()

    def divide(self, model: nn.Module, family: str, spec: Spec) -> None:
        """Have a model, or this rank's stages of it, work on this rank's places of sequences.

        Args:
            model: of a family of `FAMILIES`; changed in place.
            family: its `model.name`.
            spec: the shape of the examples.

        Raises:
            ConfigError: the family does not attend causally to a sequence, or its sequences cannot be cut so.
        """
        if family not in FAMILIES:
            raise ConfigError(
                f"parallel.cp: {self.size}, but model.name={family} is no model of sequences with causal attention",
                f"use parallel.cp=1 with it, or one of {', '.join(sorted(FAMILIES))}",
            )
        if spec.max_length % (2 * self.size):
            raise ConfigError(
                f"parallel.cp: {self.size} ranks cut each sequence into {2 * self.size} slices, but the dataset was made with "
                f"data.max_length={spec.max_length}",
                f"preprocess again with a data.max_length that is a multiple of {2 * self.size}, or use parallel.cp=1",
            )
        FAMILIES[family](model, self)

    def part(self, batch: Batch) -> Batch:
        """This rank's places of tensors (batch, length, ...)."""
        return {name: self.take(value, 1) for name, value in batch.items()}

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's places of something of all places along a dimension."""
        slices = whole.chunk(2 * self.size, dim)
        return torch.cat([slices[self.rank], slices[-1 - self.rank]], dim)

    def gather(self, mine: Tensor, dim: int) -> Tensor:
        """What `take` was given, of what all ranks have; backward, the gradients of all ranks are summed."""
        parts = DTensor.from_local(mine, self.mesh, [Shard(dim)], run_check=False)
        whole = parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        slices = whole.chunk(2 * self.size, dim)
        # Rank by rank, the early slice and the late one.
        return torch.cat([*slices[::2], *slices[::-2]], dim)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of this rank's queries (batch, heads, places, width) to keys and values of all places."""
        length = query.shape[2] // 2
        ends = ((self.rank + 1) * length, key.shape[2] - self.rank * length)
        return torch.cat(
            [
                causal_attention(part, key[:, :, :end], value[:, :, :end])
                for part, end in zip(torch.split(query, length, 2), ends, strict=True)
            ],
            2,
        )


def _decoder(model: Any, context: Context) -> None:
    """Rotary angles and pairs of tokens are those of the whole sequence, attention sees all of it."""
    model.beside = partial(_angles, model, context)
    model.before = partial(_before, model, context)
    for block in model.blocks:
        if block is not None:
            block.mix = partial(_mix, block, context)


# family -> what has its model work on places of a sequence
FAMILIES: dict[str, Callable[[Any, Context], None]] = {"decoder": _decoder}


def _angles(model: Decoder, context: Context, inputs: Tensor) -> tuple[Tensor, ...]:
    whole = inputs.new_empty(1, inputs.shape[1] * context.size)
    return tuple(context.take(each, 0) for each in Decoder.beside(model, whole))


def _before(model: Decoder, context: Context, inputs: Tensor) -> Tensor:
    return context.take(Decoder.before(model, context.gather(inputs, 1)), 1)


def _mix(block: Any, context: Context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys and values travel together, before they are spread over the heads of queries."""
    widths = [key.shape[-1], value.shape[-1]]
    key, value = torch.split(context.gather(torch.cat([key, value], -1), 2), widths, -1)
    return context.attention(query, *block.spread(key, value))
