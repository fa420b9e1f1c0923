"""Is this machine, or this image, fit to run stages? `python -m trainer doctor`, the sanity command of every image.

Prints facts (versions, limits, folders, drivers, which stages can run) and findings: what is wrong, why it matters and
what to do. Imports nothing heavy but torch, where it is installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.cores import num_cores
from trainer.errors import EXIT_BAD_INPUT, EXIT_OK
from trainer.stage import STAGES

CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")  # noqa: S108
MB = 1_000_000
# What each stage imports when it works, beside what every stage needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "preprocess": ("numpy", "pyarrow", "tokenizers", "tiktoken", "daft"),
    "tune": ("numpy", "torch", "safetensors", "optuna"),
    "train": ("numpy", "torch", "safetensors"),
    "distill": ("numpy", "torch", "safetensors"),
    "quantize": ("numpy", "torch", "safetensors", "torchao", "onnx", "onnxscript", "onnxruntime"),
    "evaluate": ("numpy", "pyarrow", "torch", "safetensors", "tokenizers", "onnxruntime", "sklearn"),
    "promote": ("numpy",),
}
# What each image is for.
IMAGES: dict[str, tuple[str, ...]] = {
    "data": ("preprocess", "promote"),
    "trainer": ("tune", "train", "distill", "quantize", "evaluate"),
    "launcher": (),
}
DRIVERS = {"s3fs": "s3://", "gcsfs": "gs://", "adlfs": "abfs://", "dvc": "dvc:"}
# Importing torch takes 300 MB, the tokenizer and a small model as much again.
MIN_MEMORY = 512 * MB
MIN_TEMPORARY = 256 * MB
MIN_SHM = 1000 * MB


@dataclass(frozen=True)
class Finding:
    """Something wrong: what it is, why it matters, and the command or setting that puts it right."""

    what: str
    why: str
    fix: str


@dataclass(frozen=True)
class Report:
    """What was found out: facts by name, and findings; without findings, all is well."""

    facts: dict[str, Any]
    findings: tuple[Finding, ...]


def examine(environ: Mapping[str, str] = os.environ) -> Report:
    """Look at this process's machine or container."""
    memory, quota = memory_limit(CGROUP), cpu_quota(CGROUP)
    facts: dict[str, Any] = {
        "millrace": __version__,
        "image": environ.get("MILLRACE_IMAGE", ""),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "user": os.getuid() if hasattr(os, "getuid") else 0,
        "cores": num_cores(),
        "cpu_quota": quota,
        "memory_limit": memory,
        "writable": {name: writable(path) for name, path in folders(environ).items()},
        "temporary_free": shutil.disk_usage(tempfile.gettempdir()).free if _temporary() else 0,
        "shm": _shm_size(),
        "clock": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "drivers": {scheme: find_spec(name) is not None for name, scheme in DRIVERS.items()},
        "stages": {name: missing(name) for name in STAGES},
        "torch": torch_facts(),
    }
    return Report(facts, tuple(_findings(facts)))


def folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Folders that stages and their libraries write to."""
    return {"HOME": Path(environ.get("HOME") or "/"), "TMPDIR": Path(environ.get("TMPDIR") or "/tmp"), "shm": SHM}  # noqa: S108


def writable(folder: Path) -> bool:
    """Whether a file can be made in it: permissions alone do not tell of a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def missing(stage: str) -> list[str]:
    """Packages that the stage would import and that are not installed."""
    return [name for name in NEEDS.get(stage, ()) if find_spec(name) is None]


def memory_limit(cgroup: Path) -> int:
    """Bytes that this cgroup may use, by version 2 or 1; 0: no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        # Version 1 says "no limit" by a number near 2 to the power of 63.
        return 0 if text == "max" or int(text) >= 1 << 60 else int(text)
    return 0


def cpu_quota(cgroup: Path) -> float:
    """Cores' worth of time that this cgroup may use, by version 2 or 1; 0: no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except OSError:
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        except OSError:
            return 0.0
    return 0.0 if quota == "max" or int(quota) <= 0 else int(quota) / int(period)


def torch_facts() -> dict[str, Any]:
    """Versions of torch, CUDA and NCCL and the GPUs' names; empty without torch, `error` where it cannot be imported."""
    if find_spec("torch") is None:
        return {}
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda or "", "nccl": "", "gpus": []}
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    facts["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    facts["compiler"] = next((name for name in ("g++", "clang++") if shutil.which(name)), "")
    return facts


def _temporary() -> bool:
    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError:
        return False


def _shm_size() -> int:
    return shutil.disk_usage(SHM).total if SHM.is_dir() else 0


def _findings(facts: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _folder_findings(facts)
    yield from _limit_findings(facts)
    yield from _torch_findings(facts)
    image = facts["image"]
    for stage in IMAGES.get(image, ()):
        if lacking := facts["stages"][stage]:
            yield Finding(
                f"{', '.join(lacking)}: not installed",
                f"stage {stage} of the image {image} imports it",
                f"build the image again: make images IMAGES={image}",
            )
    if image and facts["user"] == 0:
        yield Finding(
            "the process runs as root",
            "Pod Security `restricted` does not admit it, and files that it writes belong to root",
            "leave the image's user (65532): drop `--user 0`, or set runAsUser and runAsNonRoot in the pod",
        )
    newest = Path(__file__).stat().st_mtime
    if time.time() < newest - 86_400:
        yield Finding(
            f"the clock says {facts['clock']}, which is before this program was installed",
            "certificates and signed requests of object stores are refused, and records carry wrong times",
            "set the machine's clock: timedatectl set-ntp true",
        )


def _folder_findings(facts: Mapping[str, Any]) -> Iterator[Finding]:
    why = {
        "HOME": "libraries keep caches and settings there",
        "TMPDIR": "stages fetch remote inputs and build remote outputs there",
        "shm": "processes that share work need semaphores there",
    }
    fix = {
        "shm": "mount a tmpfs: `--tmpfs /dev/shm`, in a pod an emptyDir with `medium: Memory`",
    }
    for name, good in facts["writable"].items():
        if not good and (name != "shm" or sys.platform == "linux"):
            where = SHM if name == "shm" else name
            yield Finding(
                f"{where} is not writable by user {facts['user']}",
                why[name],
                fix.get(
                    name,
                    f"mount a writable folder and point {name} to it: `--tmpfs /tmp`, in a pod an emptyDir at /tmp",
                ),
            )
    if facts["writable"]["TMPDIR"] and facts["temporary_free"] < MIN_TEMPORARY:
        yield Finding(
            f"TMPDIR has {facts['temporary_free'] / MB:.0f} MB left",
            why["TMPDIR"],
            "give it more room: `--tmpfs /tmp:size=4g`, in a pod a larger sizeLimit of the emptyDir",
        )


def _limit_findings(facts: Mapping[str, Any]) -> Iterator[Finding]:
    if 0 < facts["memory_limit"] < MIN_MEMORY:
        yield Finding(
            f"at most {facts['memory_limit'] / MB:.0f} MB of memory",
            "the libraries alone take half of that, and the kernel kills what takes more (exit code 137)",
            "raise it: `--memory 2g`, in a pod resources.limits.memory: 2Gi",
        )
    if facts["cpu_quota"] > 0 and facts["cores"] > max(1, int(facts["cpu_quota"])):
        yield Finding(
            f"a quota of {facts['cpu_quota']:g} cores, and {facts['cores']} that can be seen",
            "as many threads as cores are started, and the quota stops them all for most of the time",
            f"train.threads={max(1, int(facts['cpu_quota']))} data.workers={max(1, int(facts['cpu_quota']))}",
        )
    if not (3, 11) <= sys.version_info < (3, 14):
        yield Finding(
            f"Python {facts['python']}", "the locks are made for Python 3.11 to 3.13", "make PYTHON=python3.12 run"
        )


def _torch_findings(facts: Mapping[str, Any]) -> Iterator[Finding]:
    torch = facts["torch"]
    if "error" in torch:
        yield Finding(
            f"torch cannot be imported: {torch['error']}", "no model can be trained", "install it again: make setup"
        )
    elif torch.get("cuda") and not torch["gpus"] and _gpus_given():
        yield Finding(
            "a GPU is given to this container, and torch cannot use it",
            f"training would fall back to the CPU; torch is built for CUDA {torch['cuda']}",
            "install a driver that supports this CUDA on the host, and start with `--gpus all` or the device plugin",
        )
    elif len(torch.get("gpus", ())) > 1:
        if not torch["nccl"]:
            yield Finding(
                "torch has no NCCL", "GPUs cannot exchange gradients", "install a torch that is built with NCCL"
            )
        if facts["shm"] < MIN_SHM:
            yield Finding(
                f"{SHM} holds {facts['shm'] / MB:.0f} MB",
                "NCCL hangs or fails when GPUs of one machine exchange gradients through it",
                "`--shm-size 2g`, in a pod an emptyDir with `medium: Memory` at /dev/shm",
            )


def _gpus_given() -> bool:
    return Path("/dev/nvidiactl").exists() or os.environ.get("NVIDIA_VISIBLE_DEVICES", "void") not in (
        "",
        "void",
        "none",
    )


def show(report: Report) -> str:
    """The report as text for people."""
    facts = report.facts
    torch = facts["torch"]
    runnable = [name for name, lacking in facts["stages"].items() if not lacking]
    lines = {
        "millrace": facts["millrace"] + (f", image {facts['image']}" if facts["image"] else ""),
        "python": f"{facts['python']} on {facts['platform']}",
        "user": facts["user"],
        "cores": f"{facts['cores']}" + (f", quota {facts['cpu_quota']:g}" if facts["cpu_quota"] else ", no quota"),
        "memory": f"at most {facts['memory_limit'] / MB:.0f} MB" if facts["memory_limit"] else "no limit",
        "writable": ", ".join(name for name, good in facts["writable"].items() if good) or "nothing",
        "room": f"TMPDIR {facts['temporary_free'] / MB:.0f} MB free, /dev/shm {facts['shm'] / MB:.0f} MB",
        "clock": facts["clock"],
        "stores": ", ".join(scheme for scheme, there in facts["drivers"].items() if there) or "local files only",
        "torch": _torch_line(torch),
        "stages": ", ".join(runnable) or "none",
    }
    text = [f"{name:<10}{value}" for name, value in lines.items()]
    for finding in report.findings:
        text += ["", f"finding: {finding.what}", f"  why: {finding.why}", f"  fix: {finding.fix}"]
    return "\n".join([*text, "", f"{len(report.findings)} findings" if report.findings else "all is well"])


def _torch_line(torch: Mapping[str, Any]) -> str:
    if not torch:
        return "not installed"
    if "error" in torch:
        return str(torch["error"])
    parts = [torch["version"], f"CUDA {torch['cuda'] or 'none'}", f"NCCL {torch['nccl'] or 'none'}"]
    return ", ".join(
        [*parts, f"GPUs: {', '.join(torch['gpus']) or 'none'}", f"C++ compiler: {torch['compiler'] or 'none'}"]
    )


def run(as_json: bool) -> int:
    """Print the report; returns the exit status: 0, or 2 with findings."""
    report = examine()
    if as_json:
        content = {**report.facts, "findings": [dataclasses.asdict(each) for each in report.findings]}
        print(json.dumps(content | {"sane": not report.findings}))
    else:
        print(show(report))
    return EXIT_BAD_INPUT if report.findings else EXIT_OK
