"""The tensors of a checkpoint as torch DCP shards, read without trusting its pickle."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import WriteResult

from trainer import storage
from trainer.errors import ArtifactError

# What stands in the `.metadata` of our checkpoints, name by name: a module's other names (what it imports) stay out.
_SAFE = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
# What unpickling and reading raise for a checkpoint of another version of torch, or for none at all.
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        yield


class Planner(DefaultSavePlanner):
    """DCP's plan of who writes what: each rank its shards; what several hold is written once, divided among them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def mine(self, tensors: dict[str, Tensor]) -> SavePlan:
        """What this rank could write of named tensors, plain or DTensors."""
        self.set_up_planner(tensors)
        return self.create_local_plan()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """What this rank holds of a tensor, as `write` was given it."""
        found: Tensor = self.state_dict[index.fqn]
        return found


@dataclass(frozen=True)
class Share:
    """What a rank writes: its part of a plan that all ranks have made together, and the metadata of the whole."""

    plan: SavePlan
    metadata: Metadata


def divide(plans: list[SavePlan], rank: int) -> Share:
    """This rank's share of what all ranks could write; every rank comes to the same division."""
    divided, metadata = Planner().create_global_plan(plans)
    return Share(_Writer(Path()).prepare_global_plan(divided)[rank], metadata)


def write(place: Path, share: Share, held: dict[str, Tensor]) -> list[list[Any]]:
    """Write this rank's file; no rank waits for another. Files are synced when they are sealed.

    Args:
        place: folder, which exists.
        share: from `divide`.
        held: what this rank holds of each tensor.

    Returns:
        Where each piece stands, as JSON values; `finish` wants those of all ranks.
    """
    planner = Planner()
    planner.set_up_planner(dict(held))
    planner.finish_plan(share.plan)
    try:
        results = _Writer(place).write_data(share.plan, planner).value()
    except RuntimeError as error:
        # On a full disk torch's zip writer fails twice, and tells of the second time only.
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
    return [
        [found.index.fqn, found.index.offset and list(found.index.offset), found.index.index, found.size_in_bytes,
         found.storage_data.relative_path, found.storage_data.offset, found.storage_data.length]
        for found in results
    ]  # fmt: skip


def finish(place: Path, share: Share, results: list[list[list[Any]]]) -> None:
    """Write `.metadata` when the files of all ranks are there; `results` are what `write` returned on each."""
    pieces = [
        [
            WriteResult(MetadataIndex(name, offset, index), size, _StorageInfo(path, start, length))
            for name, offset, index, size, path, start, length in part
        ]
        for part in results
    ]
    _Writer(place).finish(replace(share.metadata), pieces)


Like = Callable[[str, torch.Size, torch.dtype], Tensor | None]


def empty(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """A whole tensor in the host's memory."""
    return torch.empty(size, dtype=dtype)


def load_tensors(place: Path, like: Like = empty) -> dict[str, Tensor | None]:
    """Read the tensors of a checkpoint whose digests were checked; ranks do not wait for each other.

    Args:
        place: the checkpoint's folder.
        like: called with name, whole size and type of each tensor; gives the tensor to fill in: a plain one, a DTensor
            of which only this rank's shard is read, or None to leave it out.

    Returns:
        Every name, with the tensor or None where it was left out.

    Raises:
        ArtifactError: it holds something else than tensors, or cannot be read.
        StorageError: a file cannot be read.
    """
    try:
        with storage.explained(place):
            return _load_tensors(place, like)
    except _UNREADABLE as error:
        raise unreadable(place, error) from error


def unreadable(place: Path, error: Exception) -> ArtifactError:
    """The error for a checkpoint that passes its digests: nothing may be removed for it."""
    return ArtifactError(
        f"{place}: is whole, but cannot be read: {type(error).__name__}: {error}",
        "read it with the versions of millrace and torch that wrote it, or move it away to start without it",
    )


def _load_tensors(place: Path, like: Like) -> dict[str, Tensor | None]:
    reader = SafeReader(place)
    found: dict[str, Tensor | None] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"holds {name!r}, which is not a tensor")
        found[name] = like(name, entry.size, entry.properties.dtype)
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    try:
        with _quiet():
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp_load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        # It keeps what has happened in a table by rank.
        raise next(iter(error.failures.values()))[0] from error
    return found | tensors


class _Writer(FileSystemWriter):
    """DCP's writer without the machine's path, which DCP notes as a `Path`: Python 3.13 cannot read one of 3.12."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, sync_files=False, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        """Nothing: what a checkpoint is stands in our manifest."""
        return StorageMeta()


class SafeReader(FileSystemReader):
    """DCP's reader with an unpickler that knows DCP's own classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            UnpicklingError: the pickle names anything else.
        """
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Import a class of the list; a dtype is found by its name in torch."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." in name or not (is_dtype or {(module, name), (module, "*")} & _SAFE):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which DCP does not write")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Enum:
    """In place of `getattr`, by which Python 3.11.0 to 3.11.3 pickles members of enums; nothing else of it."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str)):
        raise pickle.UnpicklingError(".metadata takes an attribute of what is no enum")
    return kind[name]
