"""kubectl, a volume's files and what went wrong: what tests on a real cluster share."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from components.launch import pods
from trainer import __version__

ROOT = Path(__file__).resolve().parents[1]
# The administrator's, with which tests prepare namespaces and look around. What is tested gets one of its own.
KUBECONFIG = os.environ.get("KUBECONFIG", "")
REGISTRY = os.environ.get("E2E_IMAGES", "docker.io/millrace")
CLAIM, MOUNT = "millrace", "/mnt/millrace"
USER = 65532

T = TypeVar("T")
Object = dict[str, Any]


def image(name: str) -> str:
    """The full name of this checkout's image data, trainer or launcher."""
    return f"{REGISTRY}/{name}:{__version__}"


def kubectl(*words: str, given: str | bytes = "", deadline_s: float = 60, ok: bool = True) -> str:
    """Run kubectl as the administrator and give its output.

    Args:
        words: after `kubectl`.
        given: its stdin.
        deadline_s: seconds.
        ok: fail unless it succeeds; else stderr comes with the output.
    """
    content = given.encode() if isinstance(given, str) else given
    command = ["kubectl", "--kubeconfig", KUBECONFIG, *words]
    done = subprocess.run(command, input=content, capture_output=True, timeout=deadline_s, check=False)
    text, problem = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert not ok or done.returncode == 0, f"kubectl {' '.join(words)}: {problem}"
    return text if ok else text + problem


def get(namespace: str, *words: str) -> Any:
    """One object, or those of a list: `get(ns, "pods", "-l", "app=x")`."""
    found = json.loads(kubectl("-n", namespace, "get", *words, "-o", "json"))
    return found["items"] if found.get("kind", "").endswith("List") else found


def apply(*objects: Object) -> None:
    """Make objects, or change them to this."""
    # As JSON: kubectl's YAML takes more texts for numbers and truth values than Python's.
    given = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", given=given)


def wait_for(what: str, probe: Callable[[], T], deadline_s: float, pause_s: float = 0.5) -> T:
    """What the probe gives as soon as that is true; fails at the deadline and says what came last."""
    end = time.monotonic() + deadline_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline_s:g} s: {what} (last: {found!r})")
        time.sleep(pause_s)


def condition(obj: Object, kind: str) -> Object:
    """The condition of an object's status, if it is true; else {}."""
    found = (each for each in obj.get("status", {}).get("conditions") or [] if each["type"] == kind)
    return next((each for each in found if each["status"] == "True"), {})


class Volume:
    """The files of a namespace's claim `millrace`, read and written through a pod that mounts it."""

    POD = "files"
    UNPACK = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall(sys.argv[1])"
    PACK = "import sys, tarfile; tarfile.open(fileobj=sys.stdout.buffer, mode='w|').add(sys.argv[1], '.')"

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._started = False

    def put(self, source: Path, name: str) -> str:
        """Copy a local folder to a new folder of the volume; gives its path in pods."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as file:
            file.add(source, ".")
        path = f"{MOUNT}/{name}"
        self._python(self.UNPACK, path, given=packed.getvalue())
        return path

    def fetch(self, name: str, target: Path) -> Path:
        """Copy a folder of the volume to a new local folder."""
        with tarfile.open(fileobj=io.BytesIO(self._python(self.PACK, f"{MOUNT}/{name}"))) as file:
            file.extractall(target, filter="data")
        return target

    def files(self, name: str = "") -> list[str]:
        """All files below a folder of the volume, relative to it and in order; none if there is no such folder."""
        program = (
            "import sys, pathlib as p; root = p.Path(sys.argv[1])\n"
            "print(*sorted(str(each.relative_to(root)) for each in root.rglob('*') if each.is_file()), sep='\\n')"
        )
        return self._python(program, f"{MOUNT}/{name}").decode().split()

    def text(self, name: str) -> str:
        """The content of a file of the volume."""
        program = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
        return self._python(program, f"{MOUNT}/{name}").decode()

    def _python(self, program: str, *words: str, given: bytes = b"") -> bytes:
        if not self._started:
            self._start()
        command = ["-n", self.namespace, "exec", "-i", self.POD, "--", "python", "-c", program, *words]
        done = subprocess.run(
            ["kubectl", "--kubeconfig", KUBECONFIG, *command],
            input=given,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def _start(self) -> None:
        container = {
            "name": "files", "image": image("launcher"), "command": ["sleep", "7200"],
            "securityContext": pods.container_security(),
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
            "volumeMounts": [{"name": "claim", "mountPath": MOUNT}],
        }  # fmt: skip
        spec = {
            "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0, "restartPolicy": "Never",
            "securityContext": pods.pod_security(USER), "containers": [container],
            "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": CLAIM}}],
        }  # fmt: skip
        apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": self.POD, "namespace": self.namespace},
                "spec": spec,
            }
        )
        kubectl(
            "-n", self.namespace, "wait", "--for=condition=Ready", f"pod/{self.POD}", "--timeout=120s", deadline_s=130
        )
        self._started = True


def explain(namespace: str) -> None:
    """Print what is in a namespace, what happened there and the last lines of each pod, for whoever reads a failed test."""
    kinds = "pytorchjobs,trainjobs,experiments,suggestions,trials,jobs,pods,pvc"
    print(kubectl("-n", namespace, "get", kinds, "-o", "wide", ok=False))
    print(kubectl("-n", namespace, "get", "events", "--sort-by=.lastTimestamp", ok=False)[-8000:])
    names = kubectl("-n", namespace, "get", "pods", "-o", "name", ok=False).split()
    for name in names[:12]:
        if name.startswith("pod/"):
            print(f"== {name}")
            words = ["--all-containers", "--prefix", "--tail=40", "--ignore-errors"]
            print(kubectl("-n", namespace, "logs", name, *words, ok=False)[-6000:])
