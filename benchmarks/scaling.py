"""Weak scaling over processes of one machine: two with a batch each against one, a thread each.

python benchmarks/scaling.py [--rounds 5] [--sizes "0.83 M" "10.8 M"]

The models are those of gpt.py. Twice the processes make twice the examples in a step; the efficiency is the time of a step
of one process over that of two, 1 at best: what is missing went into sums over the processes and into waiting for the slower
one, or the two cores have less than twice the speed of one. How much that is, two runs show that know nothing of each other:
no training can do better. In each round one process trains, then two do, then two apart, all through the real loop; then
one and two in a bare loop under torch's DistributedDataParallel and gloo, whose efficiency is that of the two. The figures
are of a round's median steps. The last line is the goal.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpt import SIZES
from benchmarks.overhead import spread
from tests.tiny import tiny_dataset

# Of a run, after the first.
STEPS = {"0.83 M": 100, "10.8 M": 6}
DEADLINE_S = 600.0
GOAL = 0.9
CHILD = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
import torch
from trainer import models, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.parallel.group import process_group
from trainer.train.fit import fit
from trainer.train.state import seed_all

ends = []
together = process_group("auto", 300.0, torch.device("cpu")) if os.environ["WORLD_SIZE"] != "1" else nullcontext()
with together:
    dataset, params = Dataset(sys.argv[1]), load(None, sys.argv[2:])
    seed_all(0)
    model = models.build(params.model, dataset.spec)
    fit(params, tasks.build(params, dataset), model, on_step=lambda *_: ends.append(time.perf_counter()))
if os.environ["RANK"] == "0":
    print("ends", *ends)
"""
# The same model, batches, optimizer and kernels under torch DDP, in the bare loop of overhead.py.
PEER = """
import sys, time
import numpy as np
import torch
from benchmarks.overhead import bare
from trainer import models, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.train.device import machine
from trainer.train.state import seed_all

ends, dataset, params = [], Dataset(sys.argv[1]), load(None, sys.argv[2:])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
with machine(params.train):
    seed_all(0)
    model = torch.nn.parallel.DistributedDataParallel(models.build(params.model, dataset.spec).train())
    task, size, steps = tasks.build(params, dataset), params.train.batch_size, params.train.max_steps
    order = np.random.default_rng(0).permutation(task.num_examples("train"))
    step = bare(params, model, steps)
    for number in range(steps):
        step(task.batch("train", np.resize(order[(2 * number + rank) * size :], size)))
        ends.append(time.perf_counter())
torch.distributed.destroy_process_group()
if rank == 0:
    print("ends", *ends)
"""


def step_s(dataset: Path, size: str, processes: int, apart: bool = False, program: str = CHILD) -> float:
    """Seconds of the median step of a run; `apart`: of as many runs of one process at the same time."""
    world = 1 if apart else processes
    words = [
        *SIZES[size][0].words(), "task.name=lm", "model.name=decoder", "distill.enabled=false", "train.device=cpu",
        f"train.max_steps={STEPS[size] + 1}", "train.threads=1", "train.precision=fp32",
        "train.compile=false", f"train.processes={world}",
    ]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", program, str(dataset), *words]
    running = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env={**shared, "RANK": str(0 if apart else rank)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [each.communicate(timeout=DEADLINE_S)[0] for each in running]
    finally:
        for each in running:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()
    if any(each.returncode for each in running):
        raise SystemExit(f"error: exit status {[each.returncode for each in running]}")
    line = next(line for line in said[0].splitlines() if line.startswith("ends "))
    ends = [float(word) for word in line.split()[1:]]
    return statistics.median(after - before for before, after in pairwise(ends))


def main() -> None:
    """Print the time of a step of one and of two processes, and the efficiency."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    args = parser.parse_args()
    columns = ("1 process", "2 processes", "2 apart", "DDP, 1 process", "DDP, 2 processes")
    print(f"{'min / median / max, ms':<24}" + "".join(f"{column:>26}" for column in columns))
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes:
            folder = Path(place) / size.replace(" ", "")
            tiny_dataset(folder, "lm", rows=3000, max_length=SIZES[size][0].length)
            rounds = [
                (
                    step_s(folder, size, 1),
                    step_s(folder, size, 2),
                    step_s(folder, size, 2, apart=True),
                    step_s(folder, size, 1, program=PEER),
                    step_s(folder, size, 2, program=PEER),
                )
                for _ in range(args.rounds)
            ]
            times = list(zip(*rounds, strict=True))
            print(
                f"{'GPT ' + size:<24}" + "".join(f"{spread([1e3 * s for s in each]):>26}" for each in times), flush=True
            )
            shares = {which: [each[base] / each[which] for each in rounds] for which, base in ((1, 0), (2, 0), (4, 3))}
            cells = (spread(shares[which], 2) if which in shares else "" for which in range(5))
            print(f"{'  efficiency':<24}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    print(f"goal: at least {GOAL}")


if __name__ == "__main__":
    main()
