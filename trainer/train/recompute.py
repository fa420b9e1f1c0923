"""Recompute activations in the backward pass instead of keeping them (Chen et al. 2016): `train.recompute`.

It wraps the blocks' `forward`, in place: names of parameters stay. Random numbers are those of the first time, so that
losses and gradients are the same to the bit, with dropout too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.config.train_parts import Recompute
from trainer.errors import ConfigError

_aten = torch.ops.aten
# Products with matrices, and attention: most of the work, little of the memory (torchtitan's `_save_list`). Not products of
# batches: they are the scores of an attention that is written out.
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply(model: nn.Module, recompute: Recompute) -> None:
    """Have the blocks of a model recompute their activations, as the section says.

    Raises:
        ConfigError: the model has no blocks.
    """
    if recompute.mode == "none":
        return
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(
            f"train.recompute.mode: {recompute.mode}, but {type(model).__name__} has no blocks",
            "use train.recompute.mode=none, or a model of blocks: encoder, decoder, vit",
        )
    extra: dict[str, Any] = {}
    if recompute.mode == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in list(blocks)[:: recompute.every if recompute.mode == "blocks" else 1]:
        if block is not None:  # another stage of a pipeline has it
            block.forward = partial(_forward, block.forward, extra)


def _forward(forward: Callable[..., Any], extra: dict[str, Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, **extra)


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
