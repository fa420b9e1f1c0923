"""The tensors of a checkpoint as torch DCP shards, read without trusting its pickle."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from trainer.errors import ArtifactError, StorageError
from trainer.parallel.group import Ranks

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
    CheckpointException,
    pickle.UnpicklingError,
    OSError,
    EOFError,
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


def save_tensors(place: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write named tensors, equal on every rank, as shards; each rank writes a share.

    Raises:
        StorageError: they could not be written.
    """
    try:
        with _quiet():
            # Files are synced when they are sealed.
            dcp_save(dict(tensors), storage_writer=_Writer(place, sync_files=False), no_dist=ranks.size == 1)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        reason = getattr(first, "strerror", None) or str(first)
        raise StorageError(f"checkpoint {place}: {reason}", "free some space, or use another --scratch") from error


def load_tensors(place: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint whose digests were checked.

    Raises:
        ArtifactError: it holds something else than tensors, or cannot be read.
    """
    try:
        return _load_tensors(place)
    except _UNREADABLE as error:
        raise ArtifactError(f"{place}: {type(error).__name__}: {error}", "remove this checkpoint") from error


def _load_tensors(place: Path) -> dict[str, Tensor]:
    reader = SafeReader(place)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ArtifactError(f"{place}: holds {name!r}, which is not a tensor", "remove this checkpoint")
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _quiet():
        dcp_load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class _Writer(FileSystemWriter):
    """DCP's writer without the machine's path, which DCP notes as a `Path`: Python 3.13 cannot read one of 3.12."""

    def storage_meta(self) -> StorageMeta:
        """Nothing: what a checkpoint is stands in our manifest."""
        return StorageMeta()


class SafeReader(FileSystemReader):
    """DCP's reader with an unpickler that knows DCP's own classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            ArtifactError: the pickle names anything else.
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
            raise ArtifactError(f".metadata names {module}.{name}, which DCP does not write", "remove this checkpoint")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Enum:
    """In place of `getattr`, by which Python 3.11.0 to 3.11.3 pickles members of enums; nothing else of it."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str)):
        raise ArtifactError(".metadata takes an attribute of what is no enum", "remove this checkpoint")
    return kind[name]
