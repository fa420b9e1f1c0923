"""One container: what it is started for, how it is run to its end, and by which labels it is found again."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
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
    from docker.errors import DockerException
    from urllib3.exceptions import HTTPError

    # What an engine answers, and what happens if it does not answer any more.
    trouble = (DockerException, HTTPError, OSError)
    try:
        container = client.containers.create(image, command, volumes=volumes, **options)
    except trouble as error:
        raise MillraceError(f"{image}: the container was not made: {_cause(error)}", "see the message") from None
    try:
        try:
            container.start()
        except trouble as error:
            raise MillraceError(f"{image}: the container does not start: {_cause(error)}", "see the message") from None
        with suppress(*trouble):
            _print_output(container)
        try:
            return _exit_code(container.wait())
        except trouble as error:  # podman says 500, not 404, of a container that has gone
            sys.stdout.write(f"the container has gone: {_cause(error)}\n")
            return GONE
    finally:
        with suppress(*trouble):
            container.remove(force=True)


def _exit_code(answer: Mapping[str, Any]) -> int:
    """The code in what `wait` answers.

    Raises:
        OSError: the engine waited in vain; the code beside such an error means nothing, podman's is 0.
    """
    if error := answer.get("Error"):
        raise OSError(error.get("Message") or error)
    return int(answer["StatusCode"])


def _cause(error: BaseException) -> str:
    return str(getattr(error, "explanation", None) or error)


def _print_output(container: Container) -> None:
    # A frame may end within a character.
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    for frame in container.logs(stream=True, follow=True):
        sys.stdout.write(decode(frame))  # kfp's print indents


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
    """All containers of a run, or of all runs, ended ones too; `attrs` are those of the list."""
    label = f"{RUN_LABEL}={run}" if run else RUN_LABEL
    # Not looked at one by one: podman fails if one of them goes meanwhile.
    found: list[Container] = client.containers.list(all=True, filters={"label": label}, sparse=True)
    return found


def remove(containers: list[Container]) -> int:
    """Kill and remove containers; returns how many."""
    from docker.errors import DockerException

    for container in containers:
        with suppress(DockerException):
            container.remove(force=True)
    return len(containers)


def remove_leftovers(client: DockerClient) -> int:
    """Remove the containers of runs whose millrace was killed; returns how many."""
    return remove(
        [each for each in containers_of(client) if is_dead((each.attrs.get("Labels") or {}).get(OWNER_LABEL, ""))]
    )
