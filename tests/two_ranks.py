"""A script on two ranks of this machine: `run_two_ranks("tests.parallel.fault_ranks", place)`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

DEADLINE = 180.0


def run_two_ranks(module: str, place: Path) -> None:
    """Run `python -m MODULE PLACE` as each of two ranks that can meet; both must end with 0. Nothing is left running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    try:
        for rank in range(2):
            meeting = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", module, str(place)]
            ranks.append(subprocess.Popen(command, env={**os.environ, **meeting}, start_new_session=True))
        assert [rank.wait(DEADLINE) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
