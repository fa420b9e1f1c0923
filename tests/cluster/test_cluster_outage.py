"""The API server stops for a while, and the launcher carries on. Needs the process of the API server on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from components.launch.api import Api
from tests.cluster_jobs import Launcher

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
SCRIPT = (
    "import os, time\nrank = int(os.environ['MILLRACE_NODE_RANK'])\n"
    "for i in range(50):\n    print(f'rank {rank} line {i}')\n    time.sleep(1)\n"
)


def test_the_api_server_stops_for_20_s(api: Api, launcher_kubeconfig: Path) -> None:
    found = subprocess.run(["pgrep", "-xo", "kube-apiserver"], capture_output=True, text=True, check=False).stdout
    if not found:
        pytest.skip("the API server is not a process of this machine")
    with Launcher(launcher_kubeconfig, "outage", api.namespace, SCRIPT) as process:
        process.says("rank 0 line 3")
        os.kill(int(found), signal.SIGSTOP)
        try:
            time.sleep(20)
        finally:
            os.kill(int(found), signal.SIGCONT)
        assert process.wait() == 0, process.lines.text
    lines = [line for line in process.lines if line.startswith("rank")]
    assert lines == [f"rank 0 line {i}" for i in range(50)]
