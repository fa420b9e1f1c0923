"""A run's state between training and the disk: divided into JSON and tensors, and copied to the host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def split(tree: Any, path: str = "", tensors: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Divide nested dicts, lists and tuples into a JSON value and the tensors in it, by path."""
    tensors = {} if tensors is None else tensors
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach()
        return {"tensor": path}, tensors
    if isinstance(tree, dict):
        # As pairs: the keys of an optimizer's state may be numbers, which JSON objects cannot have.
        return {"dict": [[key, split(value, f"{path}/{key}", tensors)[0]] for key, value in tree.items()]}, tensors
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [split(value, f"{path}/{i}", tensors)[0] for i, value in enumerate(tree)]}, tensors
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree, tensors
    raise TypeError(f"{path}: a {type(tree).__name__} cannot be kept in a checkpoint")


def merge(plains: list[Any]) -> Any:
    """One JSON value of those of ranks that have different parts of a tree: entries of dicts that any of them has."""
    if not all(isinstance(plain, dict) and "dict" in plain for plain in plains):
        return plains[0]
    found: dict[Any, list[Any]] = {}
    for plain in plains:
        for key, value in plain["dict"]:
            found.setdefault(key, []).append(value)
    return {"dict": [[key, merge(values)] for key, values in found.items()]}


def join(plain: Any, tensors: Mapping[str, Tensor | None]) -> Any:
    """What `split` divided, whole again; where a tensor is None, its entry in a dict is left out."""
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: join(item, tensors) for key, item in value if not _left_out(item, tensors)}
    items = [join(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)


def _left_out(plain: Any, tensors: Mapping[str, Tensor | None]) -> bool:
    return isinstance(plain, dict) and "tensor" in plain and tensors[plain["tensor"]] is None


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard of a DTensor, else all of it."""
    shard: Any = getattr(tensor, "to_local", None)
    return shard() if shard else tensor


class Staging:
    """Buffers in the host's memory, kept from save to save: memory that was touched before is copied into fastest.

    One `copy` at a time: its result lives in the buffers until the next.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of what this rank holds of the tensors; when it returns, training may change them."""
        found = {name: local(tensor).detach() for name, tensor in tensors.items()}
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in found.items()}
        groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, tensor in found.items():
            groups.setdefault((tensor.dtype, tensor.device), []).append(name)
        for names in groups.values():
            sources, targets = [found[name] for name in names], [self._buffers[name] for name in names]
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for device in {device for _, device in groups if device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        """The buffer of a tensor; a new one where it has another shape or type than the last time."""
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            return kept
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
