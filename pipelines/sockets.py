"""Where Docker or podman listens on this machine; podman's service is started for the time of a run if it has to be."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trainer import signals
from trainer.errors import MillraceError

if TYPE_CHECKING:
    from docker import DockerClient

VARIABLE = "DOCKER_HOST"
_START_S = 20.0
# `kill -9` runs no clean-up: then the kernel ends the service.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "TERM")
_HERE = ("localhost", "127.0.0.1", "::1")
_FIX = "start Docker or podman (for podman: `systemctl --user start podman.socket`), or set DOCKER_HOST"


def candidates() -> list[Path]:
    """Sockets at which Docker and podman listen by default: the own user's podman before everybody's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return [
        Path("/var/run/docker.sock"),
        Path(runtime) / "docker.sock",
        Path.home() / ".docker" / "run" / "docker.sock",
        Path(runtime) / "podman" / "podman.sock",
        Path("/run/podman/podman.sock"),
    ]


@contextmanager
def terminated() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, through what cleans up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with signals.caught(leave, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def service() -> Iterator[DockerClient]:
    """A client of the container engine; meanwhile DOCKER_HOST names its address, for kfp and for children.

    Raises:
        MillraceError: no engine answers, or it is on another machine.
    """
    before = os.environ.get(VARIABLE)
    if before:
        _check_near(before)
        with _client(before) as client:
            yield client
        return
    for path in candidates():
        if path.is_socket() and os.access(path, os.W_OK):
            with suppress(MillraceError), _client(f"unix://{path}") as client:
                with _named(f"unix://{path}"):
                    yield client
                return
    with _own_podman() as address, _client(address) as client, _named(address):
        yield client


def _check_near(address: str) -> None:
    host = urlsplit(address).hostname or ""
    if not address.startswith(("unix://", "npipe://")) and host not in _HERE:
        message = f"{VARIABLE}: {address} is another machine, and containers are given folders of this one"
        raise MillraceError(message, "unset DOCKER_HOST to use the engine of this machine")


@contextmanager
def _client(address: str) -> Iterator[DockerClient]:
    """A client whose engine has answered."""
    import docker
    from docker.errors import DockerException

    try:
        if address.startswith("unix://"):  # docker leaks its socket if nobody answers
            with closing(socket.socket(socket.AF_UNIX)) as probe:
                probe.connect(address.removeprefix("unix://"))
        client = docker.DockerClient(base_url=address, timeout=120)
        client.ping()
    except (DockerException, OSError) as error:
        raise MillraceError(f"no container engine answers at {address}: {_cause(error)}", _FIX) from None
    try:
        yield client
    finally:
        client.close()


def _cause(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _named(address: str) -> Iterator[None]:
    os.environ[VARIABLE] = address
    try:
        yield
    finally:
        del os.environ[VARIABLE]


@contextmanager
def _own_podman() -> Iterator[str]:
    """Podman's service, started for us alone and stopped after use; containers need no service to run on."""
    podman = shutil.which("podman")
    if not podman:
        raise MillraceError("no container engine: neither Docker nor podman is running here", _FIX)
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        path = Path(folder) / "podman.sock"
        errors = Path(folder) / "errors"
        # A session of its own: the terminal's Ctrl-C is for us, and the service is needed to clean up after it.
        with open(errors, "wb") as log:
            process = subprocess.Popen(
                [*(_DIES_WITH_US if shutil.which("setpriv") else ()), podman, "system", "service", "--time=0", f"unix://{path}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + _START_S
            while not path.is_socket():
                if process.poll() is not None or time.monotonic() > deadline:
                    said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise MillraceError(f"podman's service does not start: {' '.join(said[-2:])}", _FIX)
                time.sleep(0.05)
            yield f"unix://{path}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
