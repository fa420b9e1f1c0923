"""What each GPU can do: memory, dense peak FLOP/s, bandwidths. The planner and the MFU of a run read this one table.

Peaks are the dense figures of NVIDIA's datasheets with float32 accumulation, never those "with sparsity", which are twice
as high. Memory is what torch finds on the device, a little less than the name says. Imports no torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.names import nearest
from trainer.errors import ConfigError

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of accelerator.

    Attributes:
        name: its name on the command line.
        device: pattern of the name that the driver gives it (`torch.cuda.get_device_name`).
        memory: bytes that a process can have.
        flops: precision -> dense peak FLOP/s; a precision that it lacks is absent.
        bandwidth: bytes/s between its memory and its cores.
        link: bytes/s, in one direction, to another GPU of the same node (NVLink, else PCIe).
        network: bytes/s, in one direction, to other nodes: a GPU's share of what such nodes usually have.
        price: US dollars per GPU-hour, low and high (reserved at a specialised cloud, on demand at a large one).
    """

    name: str
    device: str
    memory: float
    flops: Mapping[str, float]
    bandwidth: float
    link: float
    network: float
    price: tuple[float, float]


# When the prices were looked at; they fall from year to year.
PRICES_OF = "2025-11"


def _gpu(
    name: str,
    device: str,
    memory_gib: float,
    flops: tuple[float | None, float, float | None, float],
    bandwidth: float,
    link: float,
    network: float,
    price: tuple[float, float],
) -> Gpu:
    """A row of the table: peaks of (bf16, fp16, fp8, fp32) in TFLOP/s, bandwidths in GB/s."""
    peaks = {key: peak * TERA for key, peak in zip(("bf16", "fp16", "fp8", "fp32"), flops, strict=True) if peak}
    return Gpu(name, device, memory_gib * GIB, peaks, bandwidth * GIGA, link * GIGA, network * GIGA, price)


_TABLE = (
    _gpu("b200", r"NVIDIA B200", 178.3, (2250, 2250, 4500, 75), 8000, 900, 50, (2.8, 8.0)),
    _gpu("h200", r"NVIDIA H200", 139.8, (989, 989, 1979, 67), 4800, 450, 50, (2.0, 5.0)),
    _gpu("h100", r"NVIDIA H100 80GB HBM3", 79.1, (989, 989, 1979, 67), 3350, 450, 50, (1.5, 4.0)),
    _gpu("a100-80", r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)", 79.2, (312, 312, None, 19.5), 2039, 300, 25, (0.9, 3.4)),
    _gpu("a100-40", r"NVIDIA A100-(SXM4|PCIE)-40GB", 39.4, (312, 312, None, 19.5), 1555, 300, 12.5, (0.8, 2.8)),
    _gpu("l40s", r"NVIDIA L40S", 44.4, (362, 362, 733, 91.6), 864, 32, 12.5, (0.7, 1.9)),
    _gpu("l4", r"NVIDIA L4", 22.0, (121, 121, 242, 30.3), 300, 32, 3.1, (0.4, 0.9)),
    _gpu("a10g", r"NVIDIA A10G", 22.0, (70, 70, None, 35), 600, 32, 3.1, (0.6, 1.3)),
    _gpu("rtx4090", r"NVIDIA GeForce RTX 4090", 23.6, (165.2, 165.2, 330.3, 82.6), 1008, 32, 1.25, (0.25, 0.7)),
    _gpu("v100", r"Tesla V100-SXM[23]-(16|32)GB", 15.8, (None, 125, None, 15.7), 900, 150, 3.1, (0.5, 3.1)),
    _gpu("t4", r"Tesla T4", 14.6, (None, 65, None, 8.1), 300, 16, 3.1, (0.2, 0.6)),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


def gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ConfigError: the table has none.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: no such GPU; {nearest(name, GPUS)}", f"one of {', '.join(GPUS)}")
    return GPUS[name]


def find(device: str) -> Gpu | None:
    """The GPU that the driver calls `device`; None for one that is not in the table, and whose peak is not known.

    Variants of lower power have other names and are not guessed at: an `NVIDIA H100 PCIe` is no `NVIDIA H100 80GB HBM3`.
    """
    return next((gpu for gpu in _TABLE if re.fullmatch(gpu.device, device.strip())), None)


def peak(device: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a device, as the driver names it, in a precision (fp32, bf16, fp16, fp8); None if unknown."""
    found = find(device)
    return found.flops.get(precision) if found else None


def measured_peak(precision: str = "fp32", device: str = "cpu", seconds: float = 1.0, size: int = 1024) -> float:
    """FLOP/s of the best of the products of two `size` x `size` matrices that fit into `seconds`, on this machine.

    For CPUs, whose datasheets give no such figure; it uses as many threads as torch now has.
    """
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
    out = torch.empty(size, size, dtype=kind, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return 2.0 * size**3 / best
