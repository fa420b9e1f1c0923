"""Seconds from the loss of a node to the next step, beside plain torchrun: `python benchmarks/recovery.py`

Two nodes of one rank each, as processes of this machine, train on the CPU with gloo and save every few steps. A node is
killed with all that it runs, and its successor is started at once, as an operator does with a pod. The peer is what the
documentation of torchrun shows: `torchrun --rdzv-backend=c10d --max-restarts=3` and a script with DistributedDataParallel
that saves and loads its state, with a timeout of 60 s for collectives.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

DEADLINE = 240.0
PEER = """
import datetime, os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

place = sys.argv[1] + "/state.pt"
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)))
optimizer = torch.optim.AdamW(model.parameters())
step = 0
if os.path.exists(place):
    state = torch.load(place)
    model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"]); step = state["step"]
while step < 100_000:
    loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(8, (32,)))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    step += 1
    if step % 50 == 0 and dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, place + ".new")
        os.replace(place + ".new", place)
        print(f"stepped {step}", flush=True)
"""
WORDS = ["train.threads=1", "train.max_steps=100000", "train.eval_every=50000", "train.checkpoint_every=50", "model.dim=8",
         "model.buckets=1024", "parallel.timeout_s=60"]  # fmt: skip


class Nodes:
    """Two nodes; all that they start is ended at the end."""

    def __init__(self, command: list[str], place: Path) -> None:
        self.command, self.place = command, place
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.endpoint = f"localhost:{found.getsockname()[1]}"
        self.logs: dict[int, list[Path]] = {0: [], 1: []}
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int) -> None:
        """Start a node, with the variables that the training operator gives a pod."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PET_NNODES": "2:2", "PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": self.endpoint, "PET_MAX_RESTARTS": "3", "MILLRACE_NODE_RANK": str(rank),
        }  # fmt: skip
        self.logs[rank].append(self.place / f"log-{rank}-{len(self.logs[rank])}")
        with open(self.logs[rank][-1], "wb") as log:
            self.running[rank] = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def lose(self, rank: int) -> None:
        """Kill a node with all that it runs."""
        tree: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.running[rank].pid)
            tree = [node, *node.children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.running[rank].wait()

    def text(self) -> str:
        """All that was said, by node and in order."""
        return "".join(path.read_text(errors="replace") for logs in self.logs.values() for path in logs)

    def restart_the_dead(self) -> None:
        """A container that ends is started again, as the kubelet does, without its back-off."""
        for rank, process in self.running.items():
            if process.poll() is not None:
                self.start(rank)


def recover(command: list[str], stepping: str, lost: int) -> float:
    """Seconds from the loss of node `lost` to the next line that matches `stepping`; infinite if it takes too long."""
    with tempfile.TemporaryDirectory(prefix="millrace-recovery-") as folder:
        place = Path(folder)
        nodes = Nodes([word.replace("PLACE", folder) for word in command], place)
        try:
            for rank in (0, 1):
                nodes.start(rank)
            if not wait(nodes, stepping, 1):
                raise SystemExit(f"never began to train:\n{nodes.text()[-3000:]}")
            before = len(re.findall(stepping, nodes.text()))
            nodes.lose(lost)
            before = len(re.findall(stepping, nodes.text()))
            start = time.monotonic()
            nodes.start(lost)
            return time.monotonic() - start if wait(nodes, stepping, before + 1) else float("inf")
        finally:
            for rank in nodes.running:
                nodes.lose(rank)


def wait(nodes: Nodes, stepping: str, count: int) -> bool:
    """Whether `stepping` was said so often before the deadline."""
    end = time.monotonic() + DEADLINE
    while len(re.findall(stepping, nodes.text())) < count:
        if time.monotonic() > end:
            return False
        nodes.restart_the_dead()
        time.sleep(0.1)
    return True


def main() -> None:
    """Print a line for each lost node, with the ratio."""
    with tempfile.TemporaryDirectory(prefix="millrace-recovery-") as folder:
        script, dataset = Path(folder) / "peer.py", Path(folder) / "dataset"
        script.write_text(PEER, encoding="utf-8")
        words = ["preprocess", "--out", f"dataset={dataset}", "data.max_rows=600", "data.min_label_rows=12"]
        subprocess.run([sys.executable, "-m", "trainer", *words], check=True, stdout=subprocess.DEVNULL)
        ours = [
            sys.executable,
            "-m",
            "trainer",
            "train",
            "--in",
            f"dataset={dataset}",
            "--out",
            "model=PLACE/model",
            *WORDS,
        ]
        peer = [sys.executable, "-m", "torch.distributed.run", str(script), "PLACE"]
        for lost, name in ((1, "a node"), (0, "the node where they meet")):
            mine = recover(ours, r"(?m)^train \d+/", lost)
            other = recover(peer, r"(?m)^stepped \d+", lost)
            said = f"{other:.1f} s" if other < DEADLINE else f"not within {DEADLINE:.0f} s"
            print(f"{name} is lost: millrace steps again after {mine:.1f} s, torchrun {said} ({other / mine:.1f}x)")


if __name__ == "__main__":
    main()
