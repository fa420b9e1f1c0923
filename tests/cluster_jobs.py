"""Jobs on a real cluster whose pods run a few lines of Python, and the launcher that starts them, here or as a process.

python -m tests.cluster_jobs '{"name": "job", "namespace": "n", "script": "print(1)", "changes": {"nodes": 2}}'
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from components.launch import launcher, rbac
from components.launch.api import Api, ApiError
from components.launch.launcher import Outcome
from components.launch.pytorchjob import pytorchjob
from components.launch.spec import JobSpec

# Any image with Python will do; the cluster must have it, or be able to pull it.
IMAGE = os.environ.get("E2E_PYTHON", "python:3.11-slim")
ROOT = Path(__file__).resolve().parent.parent
KUBECTL = ["kubectl", "--request-timeout=30s"]


def kubectl(*words: str, stdin: str = "") -> str:
    """What kubectl prints, with the rights of KUBECONFIG."""
    done = subprocess.run([*KUBECTL, *words], input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
    return done.stdout


def apply(obj: dict[str, Any]) -> None:
    kubectl("apply", "-f", "-", stdin=json.dumps(obj))


@contextmanager
def restricted_namespace(name: str) -> Iterator[str]:
    """A namespace that enforces the policy restricted and lets Katib collect metrics; removed at the end."""
    labels = {
        "pod-security.kubernetes.io/enforce": "restricted",
        "katib.kubeflow.org/metrics-collector-injection": "enabled",
    }
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def launcher_kubeconfig(namespace: str, folder: Path) -> Path:
    """A kubeconfig with the rights that the launcher is shipped with, and no others."""
    account = {"name": rbac.ACCOUNT, "namespace": namespace}
    apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    apply(rbac.manifest(rbac.LAUNCHER, rbac.ACCOUNT, namespace))
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": rbac.ACCOUNT}
    subjects = [{"kind": "ServiceAccount", **account}]
    apply({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": account,
           "roleRef": reference, "subjects": subjects})  # fmt: skip
    token = kubectl("create", "token", rbac.ACCOUNT, "-n", namespace, "--duration=2h").strip()
    found = yaml.safe_load(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "yaml"))
    found["users"] = [{"name": "launcher", "user": {"token": token}}]
    found["contexts"][0]["context"] |= {"user": "launcher", "namespace": namespace}
    path = folder / "launcher.kubeconfig"
    path.write_text(yaml.safe_dump(found))
    path.chmod(0o600)
    return path


def job_spec(name: str, namespace: str, script: str, **changes: Any) -> JobSpec:
    """A job of two pods that run a script in a namespace."""
    given: dict[str, Any] = {
        "name": name, "stage": "train", "namespace": namespace, "image": IMAGE, "args": (), "nodes": 2,
        "command": ("python", "-u", "-c", script), "queue_timeout_s": 60.0, "restarts": 2, "grace_s": 2, "shm": "16Mi",
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

    def __init__(self, kubeconfig: Path, name: str, namespace: str, script: str, **changes: Any) -> None:
        asked = json.dumps({"name": name, "namespace": namespace, "script": script, "changes": changes})
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.cluster_jobs", asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=ROOT, env=os.environ | {"KUBECONFIG": str(kubeconfig)},
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
        launcher.run(Api.connect(), spec, [pytorchjob(spec)]).check()
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
