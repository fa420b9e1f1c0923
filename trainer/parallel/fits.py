"""Whether a model can be divided among ranks as section `parallel` says, before any of them is started.

Imports no torch, except to see whether this machine has the GPU that an axis needs.
"""

from __future__ import annotations

from typing import Any

from trainer.config import Params
from trainer.errors import ConfigError
from trainer.parallel.dims import Dims, check_axes, resolve
from trainer.parallel.schedule import num_parts, spans

# Families that `trainer.parallel.tensor` has a plan for; each is a stack of `model.layers` like blocks.
BLOCKS = ("decoder", "encoder", "vit")
# What decides whether pipelines and tensor parallel can divide it.
SHAPE = {"model.name", "model.layers", "model.heads", "model.kv_heads", "model.ff"}


def check(params: Params, num_ranks: int) -> Dims:
    """The axes of so many ranks, this machine's among them, by which the model can be divided as far as it is known.

    Raises:
        ConfigError: the axes do not fit the ranks, or the model has fewer blocks than stages, or heads or columns that
            `parallel.tp` does not divide.
    """
    dims = _axes(params, num_ranks)
    if dims.cp > 1 and not _has_gpu():
        check_axes(dims, "cpu", has_experts=True)
    _check_model(params, dims)
    return dims


def check_ahead(params: Params, num_ranks: int) -> None:
    """As `check`, before the search has been, of ranks elsewhere: neither what it chooses nor a GPU is judged.

    Raises:
        ConfigError: as `check`.
    """
    searched = set(params.tune.space) if params.tune.enabled else set()
    if "train.processes" in searched:
        return
    dims = _axes(params, num_ranks)
    if not searched & SHAPE:
        _check_model(params, dims)


def _axes(params: Params, num_ranks: int) -> Dims:
    dims = resolve(params.parallel, num_ranks)
    # Whether the model has experts is seen when ranks build it.
    check_axes(dims, "cpu" if params.train.device == "cpu" else "cuda", has_experts=True)
    return dims


def _check_model(params: Params, dims: Dims) -> None:
    if dims.pp > 1:
        num_parts(params.parallel)
        config: Any = params.model
        if config.name in BLOCKS:
            spans(params.parallel, config.layers)
    if dims.tp > 1:
        check_heads(params, dims.tp)


def check_heads(params: Params, size: int) -> None:
    """Whether heads and feed-forward layer can be divided among `size` ranks.

    Raises:
        ConfigError: naming the keys that do not fit.
    """
    family = params.model.name
    if family not in BLOCKS:
        raise ConfigError(
            f"parallel.tp: {size}, but model.name={family} has no plan for tensor parallel: it has no attention to divide",
            f"use parallel.tp=1 with it (parallel.zero divides any model), or one of {', '.join(BLOCKS)}",
        )
    config: Any = params.model
    keys = {"heads": config.heads, "kv_heads": getattr(config, "kv_heads", size), "ff": config.ff}
    wrong = [f"model.{key} ({value})" for key, value in keys.items() if value % size]
    if wrong:
        raise ConfigError(
            f"parallel.tp: {size} does not divide {' and '.join(wrong)}",
            "use a parallel.tp that divides them: each rank takes whole heads, and as many columns of the feed-forward layer",
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
