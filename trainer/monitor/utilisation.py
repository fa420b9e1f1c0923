"""Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): the arithmetic that a model needs over what its devices could do.

A token costs 6 N + 12 L d T: twice 3 multiplications and additions with each of N weights, forward and backward, and the
two products of attention over T places in each of L blocks of width d. What cannot be known is None, never a guess.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from trainer import storage
from trainer.parallel import gpus
from trainer.record import host

# Weights that are looked up, not multiplied.
_LOOKUPS = ("embedding", "position", "bigrams")


def flops_per_token(model: nn.Module, length: int) -> float | None:
    """Floating-point operations of training on a token; None for a model that is no stack of blocks over an embedding.

    Args:
        model: the whole model, not yet divided among ranks.
        length: tokens of a sequence, T.
    """
    blocks, embedding = getattr(model, "blocks", None), getattr(model, "embedding", None)
    if not isinstance(blocks, nn.ModuleList) or not isinstance(embedding, nn.Embedding) or not length:
        return None
    tied = getattr(model, "output", None) is None
    total = 0.0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] in _LOOKUPS and not (tied and parts[0] == "embedding"):
            continue
        # A frozen weight still passes the gradient on, but gets none.
        total += (6.0 if parameter.requires_grad else 4.0) * parameter.numel()
    return total + 12.0 * len(blocks) * embedding.embedding_dim * length


def known_peak(device: torch.device, precision: str) -> float | None:
    """Most FLOP per second of this rank's device: of a GPU from its datasheet, of a CPU as `measure` has noted it."""
    if device.type == "cuda":
        return gpus.peak(torch.cuda.get_device_name(device), precision)
    try:
        return float(json.loads(_notes().read_text(encoding="utf-8"))[_kind(precision)])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(precision: str) -> float:
    """Multiply matrices on the CPU for a second, and note the FLOP per second for later runs on this host."""
    peak = gpus.measured_peak(precision)
    with suppress(OSError, ValueError, TypeError):  # it is measured again next time
        path = _notes()
        notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(path, json.dumps({**notes, _kind(precision): peak}).encode())
    return peak


def _kind(precision: str) -> str:
    machine = f"{host()['processor']}, {host()['cores']} cores, {torch.get_num_threads()} threads"
    return f"{machine}, {precision}, torch {torch.__version__}"


def _notes() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "millrace" / "peak.json"
