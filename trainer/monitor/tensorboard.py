"""Event files of TensorBoard, written without its package: records of TFRecord that hold a protobuf `Event` each.

Formats: tensorflow/core/lib/io/record_writer.cc (length, masked CRC-32C of it, data, masked CRC-32C of the data) and
tensorboard/compat/proto/{event,summary}.proto, of which a few fields are used.
"""

from __future__ import annotations

import functools
import io
import os
import socket
import struct
import time
from pathlib import Path

from trainer.monitor.sinks import Figures

START = 1  # SessionLog.START
_LARGEST = 3.4028234e38


class TensorBoard:
    """One event file in a folder; a run that goes on adds another, which says from where."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        )
        self._file = io.FileIO(folder / name, "x")
        self._write(_bytes(3, b"brain.Event:2"))

    def resume(self, step: int, evaluated: int) -> None:
        """Have TensorBoard drop what it has of the steps after `step`."""
        self._write(_number(2, step + 1) + _bytes(7, _number(1, START)))

    def row(self, step: int, figures: Figures) -> None:
        """Write the figures as scalars."""
        values = (
            _bytes(1, _bytes(1, name.encode()) + b"\x15" + struct.pack("<f", max(-_LARGEST, min(value, _LARGEST))))
            for name, value in figures.items()
        )
        self._write(_number(2, step) + _bytes(5, b"".join(values)))

    def close(self, ok: bool) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        data = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked(length) + data + _masked(data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


@functools.cache
def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
