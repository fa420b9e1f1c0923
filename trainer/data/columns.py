"""Arrow columns straight from buffers: `pa.array` would import pandas, where it is installed, which takes a second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_TYPES = {"uint64": pa.uint64(), "int64": pa.int64(), "int32": pa.int32()}


def numbers(values: np.ndarray) -> pa.Array:
    """A column of uint64, int64 or int32 from an array of that type."""
    contiguous = np.ascontiguousarray(values)
    return pa.Array.from_buffers(_TYPES[contiguous.dtype.name], len(contiguous), [None, pa.py_buffer(contiguous)])


def blobs(values: Sequence[bytes], kind: pa.DataType | None = None) -> pa.Array:
    """A column of large_binary (or large_string, given as its UTF-8 bytes)."""
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind or pa.large_binary(), len(values), buffers)


def strings(values: Sequence[str]) -> pa.Array:
    """A column of large_string."""
    return blobs([value.encode() for value in values], pa.large_string())


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column of uint64, int64 or int32, without nulls, as an array."""
    dtype = np.dtype(str(column.type))
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype)
