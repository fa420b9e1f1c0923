"""How one container of kfp.local is run: what kfp's own DockerRunner gets wrong, and what keeps a container in.

kfp 2.17 runs containers with `auto_remove` and takes a container that has gone for one that did well, so a failed one
may be reported as green (kubeflow/pipelines#13332). `patched` puts a runner into kfp that keeps the container until
its exit code is read; where kfp no longer does that, kfp's own function is used.
"""

from __future__ import annotations

import ast
import codecs
import inspect
import itertools
import json
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainer.errors import MillraceError

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

RUN_LABEL = "millrace.run"
OWNER_LABEL = "millrace.owner"
STAGE_LABEL = "millrace.stage"
# What `docker wait` would say of a container that somebody else removed or killed.
GONE = 137

RunContainer = Callable[..., int]


@dataclass(frozen=True)
class Task:
    """What a container is started for: its stage, the folder of each output artifact, the file of each parameter."""

    stage: str
    outputs: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    parameters: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))


def task_of(command: list[str]) -> Task:
    """The task of a command `python -m trainer STAGE ... --executor-input JSON`; of another one, its first word."""
    stage = command[3] if command[1:3] == ["-m", "trainer"] and len(command) > 3 else Path(command[0]).name
    text = dict(itertools.pairwise(command)).get("--executor-input", "{}")
    try:
        made = json.loads(text)["outputs"]
        outputs = {port: Path(found["artifacts"][0]["uri"]) for port, found in made.get("artifacts", {}).items()}
        files = {name: Path(found["outputFile"]) for name, found in made.get("parameters", {}).items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return Task(stage)
    return Task(stage, outputs, files)


def run_container(client: DockerClient, image: str, command: list[str], volumes: Any, **options: Any) -> int:
    """Run a container to its end, print its output as it comes, remove it; returns its exit code.

    Takes the place of `kfp.local.docker_task_handler.run_docker_container` and has its arguments.

    Raises:
        MillraceError: the engine could not create or start it.
    """
    from docker.errors import APIError, NotFound

    try:
        container = client.containers.create(image, command, volumes=volumes, **options)
    except APIError as error:
        raise MillraceError(f"{image}: the container was not made: {error.explanation}", "see the message") from None
    try:
        try:
            container.start()
        except APIError as error:
            raise MillraceError(
                f"{image}: the container does not start: {error.explanation}", "see the message"
            ) from None
        with suppress(NotFound):
            _print_output(container)
        try:
            return int(container.wait()["StatusCode"])
        except NotFound:
            sys.stdout.write("the container was removed from outside\n")
            return GONE
    finally:
        with suppress(APIError):
            container.remove(force=True)


def _print_output(container: Container) -> None:
    # A frame may end within a character.
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    for frame in container.logs(stream=True, follow=True):
        sys.stdout.write(decode(frame))  # kfp's print indents


def upstream_is_fixed(function: RunContainer) -> bool:
    """Whether kfp's own function keeps a container until its exit code is read: it asks for no `auto_remove`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    words = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    return not any(
        word.arg in ("auto_remove", "remove") and not (isinstance(word.value, ast.Constant) and not word.value.value)
        for word in words
    )


@contextmanager
def patched(run: Callable[[RunContainer, dict[str, Any]], int]) -> Iterator[None]:
    """Let kfp.local run each container by `run(function, arguments)`; the function is kfp's own, or ours if that errs.

    Raises:
        MillraceError: this kfp has no such function.
    """
    from kfp.local import docker_task_handler

    upstream = getattr(docker_task_handler, "run_docker_container", None)
    if upstream is None:
        import kfp

        raise MillraceError(f"kfp {kfp.__version__} runs containers in another way", "install kfp>=2.17,<2.18")
    function = upstream if upstream_is_fixed(upstream) else run_container
    docker_task_handler.run_docker_container = lambda **words: run(function, words)
    try:
        yield
    finally:
        docker_task_handler.run_docker_container = upstream


def owner() -> str:
    """This process, in a label by which `remove_leftovers` of a later one sees whether it is still alive."""
    return _owner(os.getpid())


def _owner(pid: int) -> str:
    return f"{_machine()}/{_boot()}/{pid}/{_started(pid)}"


def _machine() -> str:
    """This machine, and the name space in which a pid means something."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{platform.node()}-{space}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, so that another one with the same pid is not taken for it; empty if there is none."""
    try:
        # The name, in brackets, may hold spaces: fields are counted after it.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        pass
    import psutil

    try:
        return str(round(psutil.Process(pid).create_time()))
    except psutil.Error:
        return ""


def is_dead(label: str) -> bool:
    """Whether the process of an owner label ran on this machine and runs no longer; of another machine: not known."""
    machine, _, rest = label.partition("/")
    boot, _, process = rest.partition("/")
    pid = process.partition("/")[0]
    if machine != _machine() or not pid.isdecimal():
        return False
    return boot != _boot() or _owner(int(pid)) != label


def containers_of(client: DockerClient, run: str = "") -> list[Container]:
    """All containers of a run, or of all runs, ended ones too."""
    label = f"{RUN_LABEL}={run}" if run else RUN_LABEL
    found: list[Container] = client.containers.list(all=True, filters={"label": label}, ignore_removed=True)
    return found


def remove(containers: list[Container]) -> int:
    """Kill and remove containers; returns how many."""
    from docker.errors import APIError

    for container in containers:
        with suppress(APIError):
            container.remove(force=True)
    return len(containers)


def remove_leftovers(client: DockerClient) -> int:
    """Remove the containers of runs whose millrace was killed; returns how many."""
    return remove([each for each in containers_of(client) if is_dead(each.labels.get(OWNER_LABEL, ""))])
