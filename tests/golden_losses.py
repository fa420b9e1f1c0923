"""The losses of tiny runs, to the bit: `python -m tests.golden_losses > tests/golden_losses.txt`.

Kernels are held to what every x86-64 processor has, so that the bits do not depend on the machine that prints them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Read when torch, MKL and oneDNN are loaded, so a child gets them.
PLAIN_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
COMMON = [
    "train.threads=1",
    "train.max_steps=60",
    "train.log_every=1",
    "train.eval_every=30",
    "train.device=cpu",
    "distill.enabled=false",
]
RUNS = {
    "lm": [
        "task.name=lm", "model.name=decoder", "model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2",
        "model.ff=64", "train.optimizer=muon", "train.muon_lr=0.01", "train.lr=0.01", "train.batch_size=4",
        "train.accumulation=2", "train.warmup=5", "train.schedule=wsd",
    ],
    "classify": [
        "task.name=classify", "model.name=encoder", "model.dim=32", "model.layers=2", "model.heads=2", "model.ff=64",
        "model.dropout=0.1", "train.optimizer=adamw", "train.lr=0.003", "train.batch_size=8", "train.weight_decay=0.01",
    ],
    "image": [
        "task.name=image", "model.name=cnn", "model.width=8", "train.optimizer=sgd", "train.lr=0.05", "train.batch_size=16",
        "train.label_smoothing=0.1",
    ],
}  # fmt: skip


def printed() -> str:
    """What a child prints that has the plain kernels."""
    command = [sys.executable, "-m", "tests.golden_losses", "--here"]
    environment = {**os.environ, **PLAIN_KERNELS}
    return subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE, timeout=240).stdout


def losses(name: str, folder: Path) -> list[str]:
    """A line for each step and evaluation of a run: floats as `float.hex`, which loses nothing."""
    from tests.tiny import tiny_dataset
    from trainer import models, tasks
    from trainer.config.load import load
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    params = load(None, [*COMMON, *RUNS[name]])
    dataset = tiny_dataset(folder / name, name, rows=160)
    seed_all(params.train.seed)
    model = models.build(params.model, dataset.spec)
    fitted = fit(params, tasks.build(params, dataset), model)
    lines = []
    for row in fitted.history:
        keys = ("train_loss", "grad_norm") if "train_loss" in row else ("val_loss",)
        lines.append(" ".join([name, str(row["step"]), *(f"{key}={float(row[key]).hex()}" for key in keys)]))
    return lines


def main() -> None:
    """Print the losses of all runs; progress goes to standard error."""
    if "--here" not in sys.argv:
        sys.stdout.write(printed())
        return
    lines, stdout = [], os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            lines += losses(name, Path(folder))
    sys.stdout.flush()
    os.dup2(stdout, 1)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
