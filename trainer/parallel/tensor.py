"""Tensor and sequence parallel (Shoeybi et al. 2019; Korthikanti et al. 2022): each block's matrices along the axis tp.

The first matrices of attention and of the feed-forward layer are divided by output (whole heads), the last by input; so
there is one sum over tp for each. With `parallel.sequence_parallel`, what lies between them is divided along the
sequence. Embeddings, the last norm and the head are computed on each rank, except a head of its own, whose vocabulary is
divided. To divide another family, enter its blocks in `FAMILIES` and its name in `trainer.parallel.fits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import linear

from trainer.artifacts.dataset import Spec
from trainer.config import Params
from trainer.errors import ConfigError
from trainer.parallel.fits import check_heads
from trainer.parallel.masks import divide_masks
from trainer.tasks.classify import ROUND


def divide(
    model: nn.Module, mesh: DeviceMesh, params: Params, spec: Spec, spans: list[tuple[int, int]] | None = None
) -> list[str]:
    """Divide a model in place, on the meta device.

    Args:
        model: of a family of `FAMILIES`.
        mesh: the axis tp.
        params: sections `model` and `parallel`.
        spec: the shape of the examples.
        spans: the blocks of each stage of this rank's, if it has but some; the whole sequence enters and leaves a span.

    Returns:
        Names of the parameters that every rank holds, but of whose gradient it has a part only: to be summed over tp.

    Raises:
        ConfigError: the family has no plan, or its heads or lengths cannot be divided so.
    """
    family, size = params.model.name, mesh.size()
    check_heads(params, size)
    if params.parallel.sequence_parallel:
        check_lengths(params, size, spec)
    sequence = params.parallel.sequence_parallel
    blocks: Any = model.blocks
    names: list[str] = []
    for first, end in spans or [(0, len(blocks))]:
        for index in range(first, end):
            names += [f"blocks.{index}.{name}" for name in FAMILIES[family](blocks[index], mesh, sequence)]
            divide_masks(blocks[index], mesh.get_local_rank(), sequence, params.train.compile is True)
        if sequence:
            blocks[first].register_forward_pre_hook(partial(_scatter, mesh))
            blocks[end - 1].register_forward_hook(partial(_gather, mesh))
    if getattr(model, "output", None) is not None and family == "decoder":
        parallelize_module(model, mesh, {"output": ColwiseParallel(output_layouts=Replicate())})
    return names


def check_lengths(params: Params, size: int, spec: Spec) -> None:
    """Whether sequences can be divided among `size` ranks.

    Raises:
        ConfigError: they cannot.
    """
    length = _step(params, spec) // params.parallel.cp
    if length % size:
        raise ConfigError(
            f"parallel.tp: {size} does not divide sequences, whose lengths on a rank are multiples of {length}",
            "use parallel.sequence_parallel=false, or a data.max_length (data.image_size) that parallel.tp divides",
        )


def _step(params: Params, spec: Spec) -> int:
    """What all lengths of sequences are multiples of."""
    config: Any = params.model
    if spec.task == "image":
        return int((spec.image_size // config.patch) ** 2)
    return spec.max_length if spec.task == "lm" else math.gcd(ROUND, spec.max_length)


def _decoder(block: Any, mesh: DeviceMesh, sequence: bool) -> list[str]:
    """Query, key and value by heads; gate and up by columns."""
    block.heads, block.kv_heads = block.heads // mesh.size(), block.kv_heads // mesh.size()
    first = {name: ColwiseParallel(input_layouts=Replicate()) for name in ("query", "key", "value", "gate", "up")}
    parallelize_module(block, mesh, {**first, "proj": _rows(sequence), "down": _rows(sequence)})
    # Norms of queries and keys see this rank's heads only.
    own = [f"{name}.weight" for name in ("query_norm", "key_norm") if getattr(block, name) is not None]
    return [*_norms(block, mesh, sequence), *own]


def _encoder(block: Any, mesh: DeviceMesh, sequence: bool) -> list[str]:
    """Up by columns. Query, key and value are one matrix, of which each rank holds all and uses its heads' rows."""
    total = block.heads
    block.heads = total // mesh.size()
    block.qkv.forward = partial(_own_heads, block.qkv, mesh.get_local_rank() * block.heads, block.heads, total)
    up = ColwiseParallel(input_layouts=Replicate())
    parallelize_module(block, mesh, {"up": up, "proj": _rows(sequence), "down": _rows(sequence)})
    return [*_norms(block, mesh, sequence), "qkv.weight", "qkv.bias"]


# family -> what divides one of its blocks and names the parameters of whose gradient each rank has a part
FAMILIES: dict[str, Callable[[Any, DeviceMesh, bool], list[str]]] = {
    "decoder": _decoder,
    "encoder": _encoder,
    "vit": _encoder,
}


def _rows(sequence: bool) -> RowwiseParallel:
    return RowwiseParallel(output_layouts=Shard(1) if sequence else Replicate())


def _norms(block: nn.Module, mesh: DeviceMesh, sequence: bool) -> list[str]:
    """Have both norms give all of the sequence; with sequence parallel each rank's weights see a part of it."""
    for norm in (block.norm1, block.norm2):
        assert isinstance(norm, nn.Module)
        norm.register_forward_hook(partial(_whole, mesh, sequence))
    if not sequence:
        return []
    return [name for name, _ in block.named_parameters() if name.startswith("norm")]


def _whole(mesh: DeviceMesh, sequence: bool, module: nn.Module, inputs: Any, output: Tensor) -> DTensor:
    """The output on every rank: gathered along the sequence; backward, the sum of what the ranks' columns ask for."""
    mine = DTensor.from_local(output, mesh, [Shard(1) if sequence else Replicate()], run_check=False)
    return mine.redistribute(placements=[Replicate()])


def _scatter(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """This rank's part of the sequence that enters the first block."""
    whole = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
    return (whole.redistribute(placements=[Shard(1)]).to_local(), *inputs[1:])


def _gather(mesh: DeviceMesh, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The whole sequence that leaves the last block, on every rank."""
    part = DTensor.from_local(output, mesh, [Shard(1)], run_check=False)
    whole: Tensor = part.redistribute(placements=[Replicate()]).to_local()
    return whole


def _own_heads(module: nn.Linear, first: int, heads: int, total: int, x: Any) -> Tensor:
    """Query, key and value of `heads` heads from `first` on: rows of a matrix (3, total, width) of heads."""
    x = x.to_local(grad_placements=[Partial()])
    weight = module.weight.view(3, total, -1, module.in_features)[:, first : first + heads].flatten(0, 2)
    bias = module.bias.view(3, total, -1)[:, first : first + heads].flatten()
    return linear(x, weight, bias)
