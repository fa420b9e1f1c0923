"""Join the workers' parts into the files of a dataset folder, streaming: memory does not grow with the data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.artifacts.dataset import Spec
from trainer.data.columns import to_numpy
from trainer.data.kernels import PACKED


def write_split(work: Path, folder: Path, partitions: int, counts: dict[str, int], spec: Spec) -> None:
    """Write one split's rows.parquet, and the arrays that the task has, from the parts in the work folder.

    Args:
        work: the work folder.
        folder: of the split, named as it; created.
        partitions: number of parts.
        counts: rows and tokens of the split.
        spec: the shape of the examples.
    """
    folder.mkdir(parents=True)
    stems = [work / f"part-{part}-{folder.name}" for part in range(partitions)]
    labels = _write_rows(stems, folder / "rows.parquet")
    if spec.task != "lm":
        np.save(folder / "labels.npy", labels)
    if spec.task == "image":
        shape = (counts["rows"], spec.image_channels, spec.image_size, spec.image_size)
        _join([stem.with_name(f"{stem.name}.images") for stem in stems], folder / "images.npy", "uint8", shape)
        return
    parts = [stem.with_name(f"{stem.name}.tokens") for stem in stems]
    _join(parts, folder / "tokens.npy", token_dtype(spec.vocab_size), (counts["tokens"],))
    lengths = [np.load(stem.with_name(f"{stem.name}.lengths.npy"), allow_pickle=False) for stem in stems]
    offsets = np.zeros(counts["rows"] + 1, np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets[1:])
    np.save(folder / "offsets.npy", offsets)


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds all ids."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def _write_rows(stems: list[Path], path: Path) -> np.ndarray:
    labels = [np.empty(0, np.int32)]
    with pq.ParquetWriter(path, PACKED, compression="zstd") as writer:
        for stem in stems:
            with pa.memory_map(str(stem) + ".arrow") as file:
                table = pa.ipc.open_file(file).read_all()
            labels.append(to_numpy(table.column("label")))
            if len(table):
                writer.write_table(table)
    return np.concatenate(labels)


def _join(parts: list[Path], target: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """A .npy file from raw parts: the header, then the bytes of each."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with open(target, "wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
            part.unlink()
