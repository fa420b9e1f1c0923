"""The agents of several nodes, with ranks that do nothing but wait: no node leaves before the ranks of all have ended well."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.parallel.test_train_nodes import free_port
from trainer.parallel import made

pytestmark = [pytest.mark.parallel, pytest.mark.fault, pytest.mark.slow]

DEADLINE = 120.0
COUNT = 3
# The last rank is done at once, the others when they are told.
RANK = """
import os, pathlib, sys, time
place, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
(place / f"began-{rank}-{os.getpid()}").touch()
while rank < 2 and not (place / "go").exists():
    time.sleep(0.05)
(place / f"ended-{rank}-{os.getpid()}").touch()
"""


class Agents:
    """The agents of three nodes with a rank each; all are ended at the end."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        (place / "rank.py").write_text(RANK, encoding="utf-8")

    def __enter__(self) -> Agents:
        for node in range(COUNT):
            self.start(node)
        return self

    def start(self, node: int) -> None:
        own = self.place / f"node-{node}"
        (own / "errors").mkdir(parents=True, exist_ok=True)
        (own / "spec.json").write_text(json.dumps({"scratch": str(self.place / "scratch")}), encoding="utf-8")
        environment = {
            **os.environ, "PET_NNODES": f"{COUNT}:{COUNT}", "PET_RDZV_ENDPOINT": f"localhost:{self.port}",
            "MILLRACE_NODE_RANK": str(node),
        }  # fmt: skip
        command = [sys.executable, "-m", "trainer.parallel.agent", str(os.getpid()), str(own)]
        command += [f"--nnodes={COUNT}", "--rdzv-backend=millrace", f"--rdzv-endpoint=localhost:{self.port}"]
        command += ["--nproc-per-node=1", "--max-restarts=0", "--monitor-interval=0.1"]
        self.running[node] = subprocess.Popen([*command, str(self.place / "rank.py"), str(self.place)], env=environment)

    def lose(self, node: int) -> None:
        agent = psutil.Process(self.running[node].pid)
        for process in [*agent.children(recursive=True), agent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.running[node].wait()

    def wait_for(self, what: str, rank: int, times: int) -> None:
        end = time.monotonic() + DEADLINE
        while len(list(self.place.glob(f"{what}-{rank}-*"))) < times:
            left = {node: agent.poll() for node, agent in self.running.items() if agent.poll() is not None}
            assert not left, f"nodes left before rank {rank} {what} {times} times: {left}"
            assert time.monotonic() < end, f"rank {rank} {what} fewer than {times} times"
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        for node in self.running:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.lose(node)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_whose_ranks_are_done_is_there_for_one_that_is_lost(tmp_path, lost):
    with Agents(tmp_path) as agents:
        agents.wait_for("ended", 2, 1)
        agents.wait_for("began", lost, 1)
        agents.lose(lost)
        agents.start(lost)
        agents.wait_for("ended", 2, 2)
        agents.wait_for("began", lost, 2)
        (tmp_path / "go").touch()
        assert [agent.wait(timeout=DEADLINE) for _, agent in sorted(agents.running.items())] == [0, 0, 0]


def test_what_is_made_needs_no_node_that_was_lost(tmp_path):
    with Agents(tmp_path) as agents:
        agents.wait_for("ended", 2, 1)
        agents.wait_for("began", 0, 1)
        agents.wait_for("began", 1, 1)
        agents.lose(1)
        made.keep(tmp_path / "scratch", {}, b"{}")
        (tmp_path / "go").touch()
        assert [agents.running[node].wait(timeout=DEADLINE) for node in (0, 2)] == [0, 0]
