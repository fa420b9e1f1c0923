"""Device, CPU threads, deterministic kernels and precision of a run."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.config import Train
from trainer.cores import num_cores
from trainer.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# mallopt(3): the free memory above which pages are given back, and the size from which an allocation has pages of its own.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
# To these values the C library comes by itself in a process that uses much memory.
USUAL_BYTES = 1 << 25


def choose(name: str) -> torch.device:
    """The device that `train.device` names; with several ranks on a host, each has its own GPU.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device: cuda, but torch sees no GPU", "use train.device=auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def num_threads(train: Train) -> int:
    """CPU threads of each process, where they are not measured."""
    return train.threads if isinstance(train.threads, int) and train.threads else max(1, num_cores() // train.processes)


@contextmanager
def machine(train: Train) -> Iterator[torch.device]:
    """Set threads and deterministic kernels as `train` says, give the device, and put all back at the end."""
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    compiles = train.compile is True
    if compiles:
        check_compiler(train.device)
    else:
        leave_compiler_out()
    torch.set_num_threads(num_threads(train))
    if train.deterministic:
        # cuBLAS reads this when it starts; without it, deterministic mode refuses to multiply matrices.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        set_deterministic(True, compiles)
        memory.fill_uninitialized_memory = False
    try:
        device = choose(train.device)
        on_cpu = device.type == "cpu"
        with products_by_onednn(on_cpu and onednn_is_faster()), pages_kept(on_cpu and not train.memory_gb):
            yield device
    finally:
        torch.set_num_threads(threads)
        set_deterministic(strict, compiles)
        memory.fill_uninitialized_memory = fill


@contextmanager
def pages_kept(wanted: bool) -> Iterator[None]:
    """Have the C library keep the memory that a step has freed for the next step, where it is glibc.

    Else most of it goes back to the system in each step, and its pages come anew, filled with zeros, at the first touch:
    thousands of faults, 15 % of the time of a small step.
    """
    if wanted:
        _keep_bytes(KEPT_BYTES)
    try:
        yield
    finally:
        if wanted:
            _keep_bytes(USUAL_BYTES)
            give_pages_back()


def _keep_bytes(number: int) -> None:
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, number)
        library.mallopt(M_TRIM_THRESHOLD, 2 * number - 1)


def give_pages_back() -> None:
    """Return to the system what the C library holds and nobody uses, where that is glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def products_by_onednn(wanted: bool = True) -> Iterator[None]:
    """Have torch give fp32 products of matrices on the CPU to oneDNN, see `onednn_is_faster`."""
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    if wanted:
        settings.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.matmul.fp32_precision = before


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products of matrices are to go to oneDNN: twice as fast on AVX-512 CPUs that are not Intel's.

    MKL has AVX2 for those at best. torch gives fp32 products to oneDNN only where it may round to bf16. oneDNN does that
    only on CPUs with AMX; on others the result has all of fp32's bits, which is tried here. A rule and no measurement of
    time: the same machine must always give the same bits.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C._has_mkldnn:
        return False
    try:
        vendors = re.findall(r"(?m)^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    if not vendors or "GenuineIntel" in vendors or torch.cpu._is_amx_tile_supported():
        return False
    numbers = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=numbers) for _ in range(2))
    with products_by_onednn():
        error = (left @ right).double() - left.double() @ right.double()
    # Rounding to bf16 would give 0.05.
    return float(error.abs().max()) < 1e-3


def check_compiler(device: str) -> None:
    """Raise a ConfigError where torch.compile would find no C++ compiler, which it needs on a CPU."""
    if choose(device).type == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name
    ):
        message = "train.compile: true, but there is no C++ compiler for the CPU (g++ or clang++)"
        raise ConfigError(message, "install one, or set train.compile=false")


def set_deterministic(mode: bool, compiled: bool) -> None:
    """`torch.use_deterministic_algorithms`, which imports torch's compiler (2 s) to tell it too, only if it is used."""
    if compiled:
        torch.use_deterministic_algorithms(mode)
    else:
        torch._C._set_deterministic_algorithms(mode, warn_only=False)


def leave_compiler_out() -> None:
    """Have optimizers not import torch's compiler, half of a cold start, just to exempt their methods from it.

    `torch._compile._disable_dynamo` makes the exempted function at the first call and keeps it as this attribute.
    """
    for method in vars(torch.optim.Optimizer).values():
        code = getattr(method, "__code__", None)
        if code is not None and code.co_filename == torch._compile.__file__:
            method.__wrapped__.__dict__.setdefault("__dynamo_disable", method.__wrapped__)


def autocast(train: Train, device: torch.device) -> AbstractContextManager[object]:
    """Automatic mixed precision for a forward pass; nothing for fp32."""
    if train.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[train.precision])
