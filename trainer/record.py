"""The record that each stage leaves in its outputs' manifests: what was run, on what, with what, and for how long."""

from __future__ import annotations

import functools
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.artifacts.manifest import Manifest
from trainer.errors import redact

PACKAGES = ("torch", "numpy", "tokenizers", "daft", "pyarrow", "optuna", "onnxruntime", "torchao", "scikit-learn")


class Clock:
    """Starts when it is made."""

    def __init__(self) -> None:
        self.started = time.time()
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def make_record(
    stage: str,
    clock: Clock,
    sections: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """A JSON object with resolved parameters, digests of inputs, versions, times, memory and host kind."""
    return {
        "stage": stage,
        "params": without_secrets(dict(sections)),
        "inputs": {port: found.digest for port, found in inputs.items()},
        "data_version": data_version(inputs),
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "git_commit": git_commit(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.started)),
        "seconds": round(clock.seconds(), 3),
        "peak_memory_bytes": peak_memory(),
        "host": host(),
    }


def without_secrets(value: Any) -> Any:
    """A copy of plain values without the passwords and signatures of the URIs in them."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def data_version(inputs: Mapping[str, Manifest]) -> str:
    """The version of the raw data that the inputs descend from: DVC's md5 of it; empty at the start of the chain."""
    for found in inputs.values():
        version = found.meta.get("data_version") or found.record.get("data_version")
        if version:
            return str(version)
    return ""


@functools.cache
def git_commit() -> str:
    """Commit of the working folder's repository, with `+` appended when files differ from it; empty outside of one."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, millrace and the packages that shape its numbers, as far as they are installed."""
    found = {"python": platform.python_version(), "millrace": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Largest resident set of this process or of one of its children, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit


@functools.cache
def host() -> dict[str, Any]:
    """Kind of the host: system, processor, cores and memory; never its name."""
    info: dict[str, Any] = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        info["processor"] = next(
            line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        info["processor"] = platform.processor()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        info["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return info
