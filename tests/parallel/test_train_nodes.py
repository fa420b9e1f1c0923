"""Two nodes under torchrun, as the training operator starts them: equal to two local ranks, and back after any loss."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import tiny_dataset

pytestmark = pytest.mark.parallel

DEADLINE = 240.0
WORDS = [
    "train.threads=1", "train.max_steps=300", "train.eval_every=100", "train.log_every=1", "train.lr=0.01",
    "train.checkpoint_every=5", "model.name=encoder", "model.dim=32", "model.layers=1", "model.ff=32", "model.heads=2",
    "train.batch_size=4", "parallel.timeout_s=60",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120).folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Job:
    """The nodes of a job as processes with the variables that a PyTorchJob's pods have; all are ended at the end."""

    host = "localhost"

    def at(self, rank: int) -> list[str]:
        """Words that go before a node's command."""
        return []

    def __init__(self, dataset: Path, place: Path, *words: str, count: int = 2) -> None:
        place.mkdir()
        self.dataset, self.place, self.words, self.count = dataset, place, words, count
        self.port = free_port()
        self.out, self.scratch = place / "model", place / "scratch"
        self.nodes: dict[int, subprocess.Popen[str]] = {}
        self.logs: list[Path] = []
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Job:
        for rank in range(self.count):
            self.start(rank)
        return self

    def start(self, rank: int) -> None:
        environment = {
            **os.environ, "PET_NNODES": f"{self.count}:{self.count}", "PET_RDZV_BACKEND": "c10d", "PET_MAX_RESTARTS": "3",
            "PET_NPROC_PER_NODE": "1", "PET_RDZV_ENDPOINT": f"{self.host}:{self.port}", "MILLRACE_NODE_RANK": str(rank),
        }  # fmt: skip
        command = [
            *self.at(rank),
            sys.executable,
            "-m",
            "trainer",
            "train",
            "--in",
            f"dataset={self.dataset}",
            "--out",
            f"model={self.out}",
        ]
        command += ["--scratch", str(self.scratch), *WORDS, *self.words]
        self.logs.append(self.place / f"log-{rank}-{len(self.logs)}")
        with open(self.logs[-1], "w", encoding="utf-8") as log:
            self.nodes[rank] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
            )

    def __exit__(self, *_: object) -> None:
        for process in [*self.tree(), *self.seen]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes.values():
            node.kill()
            node.wait()

    def tree(self, rank: int | None = None) -> set[psutil.Process]:
        found = set()
        for node in [self.nodes[rank]] if rank is not None else self.nodes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)}
        self.seen |= found
        return found

    def rank(self, node: int) -> psutil.Process:
        """The process that trains on a node."""
        for process in self.tree(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "trainer.train.worker" in words and "trainer.parallel.agent" not in words:
                    return process
        raise AssertionError(f"node {node} has no rank: {self.output()}")

    def lose(self, node: int) -> None:
        """A node's machine is gone: nothing of it gets to say anything."""
        for process in self.tree(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes[node].wait()

    def checkpoint(self, after: str = "") -> str:
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            newest = max((path.name for path in self.scratch.glob("*/train/step-*")), default="")
            if newest > after:
                return newest
            assert self.nodes[0].poll() is None, f"it ended without a newer checkpoint: {self.output()}"
            time.sleep(0.01)
        raise AssertionError(f"no checkpoint in time: {self.output()}")

    def finish(self) -> list[int]:
        end = time.monotonic() + DEADLINE
        return [node.wait(timeout=max(1.0, end - time.monotonic())) for _, node in sorted(self.nodes.items())]

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(encoding='utf-8')}" for path in self.logs)


def digests(model: Path) -> dict[str, str]:
    files = json.loads((model / "manifest.json").read_bytes())["files"]
    return {each["path"]: each["sha256"] for each in files if each["path"] in ("model.safetensors", "history.jsonl")}


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory):
    """The model of two local ranks."""
    out = tmp_path_factory.mktemp("local") / "model"
    command = [sys.executable, "-m", "trainer", "train", "--in", f"dataset={dataset}", "--out", f"model={out}", *WORDS]
    subprocess.run([*command, "train.processes=2"], check=True, timeout=DEADLINE, capture_output=True)
    return digests(out)


@pytest.mark.fault
@pytest.mark.slow
def test_two_nodes_make_the_model_of_two_local_ranks(dataset, tmp_path, reference):
    with Job(dataset, tmp_path / "job") as job:
        assert job.finish() == [0, 0], job.output()
        assert digests(job.out) == reference
        assert "preflight: 2 ranks summed 25 MiB" in job.output()
        assert not list(job.scratch.glob("*")), "the scratch folder is left"


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=[pytest.mark.fault, pytest.mark.slow])])
def test_a_lost_node_comes_back_and_the_model_is_the_same(dataset, tmp_path, reference, lost):
    with Job(dataset, tmp_path / "job") as job:
        job.checkpoint()
        job.lose(lost)
        job.start(lost)
        assert job.finish() == [0, 0], job.output()
        assert digests(job.out) == reference
        assert "resuming from checkpoint" in job.output()


@pytest.mark.fault
@pytest.mark.slow
def test_a_first_node_that_is_lost_while_it_publishes_needs_no_other_to_go_on(dataset, tmp_path, reference):
    with Job(dataset, tmp_path / "job") as job:
        job.checkpoint()
        job.tree()
        job.nodes[0].send_signal(signal.SIGSTOP)  # its ranks go on, but nobody publishes what they make
        assert job.nodes[1].wait(timeout=DEADLINE) == 0, job.output()
        assert not job.out.exists()
        job.lose(0)
        job.start(0)
        assert job.finish() == [0, 0], job.output()
        assert digests(job.out) == reference
        assert not list(job.scratch.glob("*")), "the scratch folder is left"


@pytest.mark.fault
@pytest.mark.slow
def test_a_node_that_is_told_to_end_leaves_a_checkpoint_and_the_others_wait_for_it(dataset, tmp_path, reference):
    with Job(dataset, tmp_path / "job") as job:
        before = job.checkpoint()
        job.nodes[1].send_signal(signal.SIGTERM)
        assert job.nodes[1].wait(timeout=60) == 143, job.output()
        step = int(re.search(r"SIGTERM at step (\d+) of 300; a checkpoint was written", job.output())[1])
        assert job.checkpoint() == f"step-{step:09d}" >= before
        assert job.nodes[0].poll() is None
        job.start(1)
        assert job.finish() == [0, 0], job.output()
        assert digests(job.out) == reference


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_rank_is_one_of_the_restarts_and_its_node_says_so(dataset, tmp_path, reference):
    with Job(dataset, tmp_path / "job") as job:
        job.checkpoint()
        job.rank(1).kill()
        assert job.nodes[1].wait(timeout=60) == 137, job.output()
        assert job.nodes[0].poll() is None
        job.start(1)
        assert job.finish() == [0, 0], job.output()
        assert "rank 1 was ended by SIGKILL" in job.output()
        assert digests(job.out) == reference


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_rank_is_restarted_in_place_where_that_is_allowed(dataset, tmp_path, reference):
    with Job(dataset, tmp_path / "job", "parallel.max_restarts=1") as job:
        job.checkpoint()
        job.rank(0).kill()
        assert job.finish() == [0, 0], job.output()
        assert digests(job.out) == reference


def test_a_permanent_error_ends_every_node_with_its_code(dataset, tmp_path):
    with Job(
        dataset, tmp_path / "job", "train.lr=90", "train.clip=0", "train.optimizer=sgd", "train.schedule=constant"
    ) as job:
        assert set(job.finish()) <= {3}, job.output()
        assert "not finite" in job.output()


@pytest.mark.fault
@pytest.mark.slow
def test_a_hung_rank_of_another_node_is_named(dataset, tmp_path):
    with Job(dataset, tmp_path / "job", "parallel.timeout_s=5") as job:
        job.checkpoint()
        hung = job.rank(1)
        hung.suspend()
        end = time.monotonic() + 60
        while time.monotonic() < end and not re.search(r"longer than 5 s", job.output()):
            time.sleep(0.2)
        assert re.search(r"longer than 5 s; in vain for rank 1; waiting for all nodes", job.output()), job.output()


def test_nodes_that_do_not_come_are_named():
    from trainer.parallel.lobby import Lobby, NodesMissing
    from trainer.parallel.nodes import Node

    with pytest.raises(NodesMissing, match=r"nodes 1, 2 of 3 did not come in 1 s"):
        Lobby(Node(0, 3, "localhost", free_port()), join_s=1.0).next_rendezvous()
