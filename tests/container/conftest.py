"""The images of this checkout and the engine that runs them: Docker, or Podman by the socket that DOCKER_HOST names.

Nothing here is skipped: without an engine or an image a test fails and says what to do. `make containers` builds first.
"""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer import __version__

IMAGES = ("data", "trainer", "launcher")
# What each image starts with. All of them hold `python -m trainer`: the stages, and the doctor.
ENTRY_POINTS = {"data": "trainer", "trainer": "trainer", "launcher": "components.launch"}
STAGE = {"entrypoint": ["python", "-m", "trainer"]}
# What every test runs under, as Pod Security `restricted` with a read-only root file system would have it.
USER = 65532
HARDENED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": "rw,mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "user": str(USER),
    "network_mode": "none",
}


@dataclass(frozen=True)
class Done:
    """How a container ended."""

    code: int
    text: str


def name_of(image: str) -> str:
    """Name and tag as the default parameters give them."""
    return f"millrace/{image}:{__version__}"


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """A client of the container engine."""
    import docker

    try:
        client = docker.from_env(timeout=280)
        client.ping()
    except docker.errors.DockerException as error:
        pytest.fail(
            f"no container engine answers ({error}); start Docker, or `podman system service --time=0 unix://SOCKET` "
            "and DOCKER_HOST=unix://SOCKET"
        )
    yield client
    client.close()


@pytest.fixture
def start(engine: Any) -> Iterator[Callable[..., Any]]:
    """Start a container of an image, hardened; all of them are removed at the end."""
    import docker

    started = []

    def start(image: str, *words: str, **options: Any) -> Any:
        name = f"millrace-test-{uuid.uuid4().hex[:12]}"
        started.append(name)
        try:
            return engine.containers.run(name_of(image), list(words), detach=True, name=name, **(HARDENED | options))
        except docker.errors.ImageNotFound:
            pytest.fail(f"no image {name_of(image)}: make images")

    yield start
    for name in started:
        try:
            engine.containers.get(name).remove(force=True)
        except docker.errors.NotFound:
            pass


@pytest.fixture
def run(start: Callable[..., Any]) -> Callable[..., Done]:
    """Run a container to its end and give its exit code and output; `folder` is mounted at its own path."""

    def run(
        image: str, *words: str, folder: Path | None = None, deadline_s: int = 240, stderr: bool = True, **options: Any
    ) -> Done:
        if folder is not None:
            options["volumes"] = {str(folder): {"bind": str(folder), "mode": "rw"}}
        container = start(image, *words, **options)
        # Followed to its end, so that nothing is missed that is written to the log after the container has ended.
        text = b"".join(container.logs(stream=True, follow=True, stderr=stderr)).decode(errors="replace")
        return Done(container.wait(timeout=deadline_s)["StatusCode"], text)

    return run


@pytest.fixture
def python(run: Callable[..., Done]) -> Callable[..., Any]:
    """Run a program in an image's Python and give what it prints, read as JSON."""

    def python(image: str, program: str, **options: Any) -> Any:
        # Libraries warn on stderr, now and then.
        done = run(image, "-c", program, entrypoint=["python"], stderr=False, **options)
        assert done.code == 0, f"{image}: {program}"
        return json.loads(done.text)

    return python


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that the images' user may write to, wherever pytest keeps its own."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(Path(os.environ.get("TMPDIR", "/tmp"))) and folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def rows(shared: Path) -> Path:
    """A few rows of two labels that words tell apart."""
    path = shared / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(
            [f"{'good fine' if i % 2 else 'bad sad'} row number {i} of {i * 7 % 13}", i % 2] for i in range(300)
        )
    return path
