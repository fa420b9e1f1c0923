"""Share of a day that is training when a run is killed every 30 minutes: `python benchmarks/goodput.py [--kills 48]`

A language model is trained in a process that is killed without notice (SIGKILL) at a random moment and started again, so many
times as a day has half hours. What a kill costs is measured: the steps done since the newest checkpoint, which are done
again, and the time from the start of the new process to its first new step, imports and digests of the checkpoint included.
Between two kills lie seconds here, not half an hour; the share of the day is what 30 minutes of training less that cost leave.
Checkpoints are written as often as they are by default. The last line is the goal of the longest restart and of the share.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY_S = 1800.0
DEADLINE_S = 120.0
CHILD = """
import sys, time
from pathlib import Path
from trainer import models, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.train.fit import fit
from trainer.train.state import seed_all

dataset, place, steps = Dataset(sys.argv[1]), Path(sys.argv[2]), open(sys.argv[3], "a")
params = load(None, sys.argv[4:])
seed_all(params.train.seed)
model = models.build(params.model, dataset.spec)
fit(params, tasks.build(params, dataset), model, scratch=place,
    on_step=lambda step, total, model: print(step, time.time(), file=steps, flush=True))
"""
WORDS = [
    "task.name=lm", "distill.enabled=false", "model.name=decoder", "model.dim=128", "model.layers=4", "model.heads=4",
    "model.kv_heads=4", "model.ff=344", "train.batch_size=12", "train.max_steps=1000000", "train.eval_every=1000000",
]  # fmt: skip


def dataset(folder: Path) -> Path:
    """A dataset folder of the Python files of the standard library, 64 tokens a window."""
    words = [
        "data.source=builtin:stdlib-modules", "data.max_rows=200", "data.max_length=64", "data.tokenizer.vocab_size=512",
        "task.name=lm", "model.name=decoder", "distill.enabled=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "trainer", "preprocess", "--out", f"dataset={folder}", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def steps_of(path: Path) -> list[tuple[int, float]]:
    """(step, time of its end) of a file's whole lines."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines if line.endswith("\n")]


def life(command: list[str], path: Path, last: int, seconds: float) -> list[tuple[int, float]]:
    """The steps of a process that is killed `seconds` after its first one beyond `last`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + DEADLINE_S
        while not any(step > last for step, _ in steps_of(path)):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"error: no new step within {DEADLINE_S:.0f} s, exit status {process.poll()}")
            time.sleep(0.02)
        time.sleep(seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return steps_of(path)


def main() -> None:
    """Print what kills cost, and the share of the day that is left."""
    parser = argparse.ArgumentParser(description="Share of a day that is training under a kill every 30 minutes.")
    parser.add_argument("--kills", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    restarts, losses = [], []
    with tempfile.TemporaryDirectory(prefix="millrace-goodput-") as folder:
        place = Path(folder)
        data = dataset(place / "dataset")
        last = 0
        for kill in range(arguments.kills + 1):
            path = place / f"steps-{kill}"
            command = [sys.executable, "-c", CHILD, str(data), str(place / "scratch"), str(path), *WORDS]
            began = time.time()
            found = life(command, path, last, rng.uniform(2.0, 10.0))
            if kill:
                again = [end for step, end in found if step <= last]
                new = [end for step, end in found if step > last]
                restarts.append(found[0][1] - began)
                losses.append(new[0] - found[0][1])
                print(f"kill {kill}: first step after {restarts[-1]:.1f} s, {len(again)} steps done again", flush=True)
            last = max(step for step, _ in found)
    cost = [a + b for a, b in zip(restarts, losses, strict=True)]
    share = 1.0 - statistics.mean(cost) / EVERY_S
    ordered = sorted(restarts)
    print(
        f"restart to the first step: {ordered[0]:.1f} / {statistics.median(ordered):.1f} / {ordered[-1]:.1f} s (min, median, max)"
    )
    print(
        f"a day with a kill every 30 minutes: {100 * share:.2f} % training ({statistics.mean(cost):.1f} s lost to a kill)"
    )
    print("goal: at most 15 s, at least 95 %")


if __name__ == "__main__":
    main()
