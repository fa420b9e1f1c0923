"""Jobs on a real cluster whose pods run a few lines of Python, and the launcher that starts them, here or as a process.

python -m tests.cluster_jobs '{"name": "job", "namespace": "n", "script": "print(1)", "changes": {"nodes": 2}}'
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from components.launch import access, launcher
from components.launch.api import Api, ApiError
from components.launch.launcher import Outcome
from components.launch.pytorchjob import pytorchjob
from components.launch.spec import JobSpec

# Any image with Python will do; the cluster must have it, or be able to pull it.
IMAGE = os.environ.get("E2E_PYTHON", "python:3.11-slim")
ROOT = Path(__file__).resolve().parent.parent

# Where a launcher process finds its service account, as in a pod: without the library that reads a kubeconfig.
FOLDER_ENV = "TEST_SERVICE_ACCOUNT"


def service_account(kubeconfig: Path, folder: Path) -> dict[str, str]:
    """Environment of a launcher that logs in as a pod does, with the rights of a kubeconfig."""
    found = yaml.safe_load(kubeconfig.read_text())
    cluster = found["clusters"][0]["cluster"]
    (folder / "token").write_text(found["users"][0]["user"]["token"])
    (folder / "ca.crt").write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
    (folder / "namespace").write_text(found["contexts"][0]["context"]["namespace"])
    server = urlsplit(cluster["server"])
    return {
        FOLDER_ENV: str(folder), "KUBERNETES_SERVICE_HOST": str(server.hostname),
        "KUBERNETES_SERVICE_PORT": str(server.port or 443),
    }  # fmt: skip


def job_spec(name: str, namespace: str, script: str, **changes: Any) -> JobSpec:
    """A job of two pods that run a script in a namespace."""
    given: dict[str, Any] = {
        "name": name, "stage": "train", "namespace": namespace, "image": IMAGE, "args": (), "nodes": 2,
        "command": ("python", "-u", "-c", script), "queue_timeout_s": 60.0, "restarts": 2, "grace_s": 2, "shm": "16Mi",
        "memory": "64Mi", "cpu": "10m",
    }  # fmt: skip
    return JobSpec(**given | changes)


class Lines(list[str]):
    """What a launcher says, with the time of each line."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def __call__(self, line: str) -> None:
        self.times.append(time.time())
        self.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self)


def launch(api: Api, spec: JobSpec, manifest: list[dict[str, Any]] | None = None) -> tuple[Outcome, Lines]:
    """Run a job to its end in this process."""
    lines = Lines()
    return launcher.run(api, spec, manifest or [pytorchjob(spec)], out=lines), lines


def pods(api: Api, name: str = "") -> list[dict[str, Any]]:
    return api.list("Pod", label_selector=f"millrace.dev/job={name}" if name else "")


def wait_for(what: Any, within_s: float = 60.0) -> Any:
    """The first true value of a function that asks the cluster."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            found = what()
        except ApiError:
            found = None
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {within_s:g} s: {what}")


class Launcher:
    """A launcher as a process of its own."""

    def __init__(self, login: Path | dict[str, str], name: str, namespace: str, script: str, **changes: Any) -> None:
        asked = json.dumps({"name": name, "namespace": namespace, "script": script, "changes": changes})
        env = os.environ | (login if isinstance(login, dict) else {"KUBECONFIG": str(login)})
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.cluster_jobs", asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=ROOT, env=env,
        )  # fmt: skip
        self.lines = Lines()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines(line.rstrip("\n"))

    def says(self, text: str, within_s: float = 60.0) -> None:
        """Wait for a line that holds a text."""
        wait_for(lambda: text in self.lines.text or self.process.poll() is not None, within_s)
        assert text in self.lines.text, self.lines.text

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, within_s: float = 120.0) -> int:
        """Its exit status."""
        status = self.process.wait(within_s)
        self._thread.join(5)
        return status

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._thread.join(5)
        if self.process.stdout:
            self.process.stdout.close()


def main() -> int:
    from trainer.__main__ import exit_status

    asked = json.loads(sys.argv[1])
    spec = job_spec(asked["name"], asked["namespace"], asked["script"], **asked["changes"])

    def run() -> int:
        folder = os.environ.get(FOLDER_ENV)
        api = Api(lambda: access.in_cluster(folder=Path(folder))) if folder else Api.connect()
        launcher.run(api, spec, [pytorchjob(spec)]).check()
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
