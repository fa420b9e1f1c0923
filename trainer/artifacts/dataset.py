"""Reader of a dataset folder, the one place that knows its files. Arrays are memory-mapped, nothing is unpickled.

    manifest.json card.md labels.json tokenizer.json
    train|val|test/rows.parquet     id (hex content hash), text, label (int32, -1 without), source ("file:line")
    train|val|test/tokens.npy       1-D uint16 or uint32: the rows' token ids, one after the other
    train|val|test/offsets.npy      int64 (rows + 1): row i is tokens[offsets[i]:offsets[i + 1]]
    train|val|test/labels.npy       int32 (rows)
    train|val|test/images.npy       uint8 (rows, channels, size, size)

`classify` has tokens, offsets and labels; `lm` tokens and offsets (a row is a document, which ends in END); `image`
images and labels. Rows of each split are ordered by id.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.artifacts import manifest
from trainer.errors import ArtifactError

SPLITS = ("train", "val", "test")
PAD, END = 0, 1
SPECIAL_TOKENS = ("<|pad|>", "<|end|>")

REMAKE = "run the stage preprocess again"


@dataclass(frozen=True)
class Spec:
    """The shape of a dataset's examples: all that a model must know of its data."""

    task: str
    vocab_size: int = 0
    num_labels: int = 0
    max_length: int = 0
    image_size: int = 0
    image_channels: int = 0


@dataclass(frozen=True)
class Split:
    """One split, memory-mapped. Arrays that the task does not have are empty."""

    name: str
    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images) if self.images.size else max(len(self.offsets) - 1, 0)

    def texts(self) -> list[str]:
        """The rows' cleaned texts, in the order of the arrays."""
        return [str(text) for text in self.column("text")]

    def column(self, name: str) -> list[Any]:
        """A column of rows.parquet."""
        import pyarrow.parquet as pq

        return list(pq.read_table(self.folder / "rows.parquet", columns=[name]).column(name).to_pylist())


class Dataset:
    """A dataset folder. `meta` is the manifest's: counts, data version and the fields of `Spec`."""

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = manifest.read(self.folder, "dataset", verify=verify)
        self.meta: dict[str, Any] = self.manifest.meta

    @cached_property
    def spec(self) -> Spec:
        """The shape of the examples."""
        return Spec(**self.meta["spec"])

    @cached_property
    def labels(self) -> list[str]:
        """Names of the labels, by number; empty for language models."""
        path = self.folder / "labels.json"
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path}: not a list of labels: {error}", REMAKE) from None

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json, in the format of Hugging Face tokenizers."""
        return self.folder / "tokenizer.json"

    def split(self, name: str) -> Split:
        """One of the splits, memory-mapped."""
        folder = self.folder / name
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: the dataset has no split {name!r}", f"use one of {', '.join(SPLITS)}")

        def array(file: str) -> np.ndarray:
            path = folder / f"{file}.npy"
            try:
                return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else np.empty(0, np.int64)
            except ValueError as error:
                raise ArtifactError(f"{path}: not an array of numbers: {error}", REMAKE) from None

        return Split(name, folder, array("tokens"), array("offsets"), array("labels"), array("images"))


def spec_meta(spec: Spec) -> dict[str, Any]:
    """A spec as it stands in a manifest."""
    return asdict(spec)
