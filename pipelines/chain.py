"""kfp.local at work on a thread: what it does as events, and a signal that ends the container that runs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import yaml

from pipelines import docker_runner, kfp_local
from pipelines.docker_runner import STAGE_LABEL, RunContainer, Task
from pipelines.engine import Event
from trainer import signals
from trainer.errors import MillraceError
from trainer.stage import STAGES

if TYPE_CHECKING:
    from docker import DockerClient

# How long a stage may take to end after a signal. Nothing goes on from what it leaves, so it is not long.
GRACE_S = 10


class _Stop(BaseException):
    """Ends kfp's walk through the graph, past its `except Exception`."""


@dataclass
class Chain:
    """A run of the compiled pipeline in containers.

    Attributes:
        folder: the run's folder; its name is the run's name.
        options: what every container is created with, `volumes` besides kfp's own among them.
        until: a stage after which none is started; empty for all.
        images: name -> id of the images that the run is made with.
        failures: stage and exit code of each container that failed, in order.
        error: what else went wrong.
        signal: the signal that ended the run, or 0.
        proceed: what the task `configure` said: "false" if there is nothing to do.
    """

    folder: Path
    options: dict[str, Any]
    until: str = ""
    images: dict[str, str] = field(default_factory=dict)
    failures: list[tuple[str, int]] = field(default_factory=list)
    error: BaseException | None = None
    signal: int = 0
    proceed: str = ""
    _events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _hurry: threading.Event = field(default_factory=threading.Event)
    _stage: str = ""

    @property
    def failed(self) -> tuple[str, int] | None:
        """The stage that failed first, and its exit code."""
        return self.failures[0] if self.failures else None

    def run(self, client: DockerClient, spec: dict[str, Any], arguments: dict[str, Any]) -> Iterator[Event]:
        """Run the pipeline and give its events; after the last one no container of the run is left."""
        worker = threading.Thread(target=self._work, args=(spec, arguments), name="kfp", daemon=True)
        stopper = threading.Thread(target=self._stop_containers, args=(worker,), name="stop", daemon=True)
        with signals.caught(self._on_signal, *signals.END):
            worker.start()
            stopper.start()
            try:
                yield from self._given(worker)
            finally:
                self._stopping.set()
                stopper.join()
                docker_runner.remove(docker_runner.containers_of(client, self.folder.name))

    def _given(self, worker: threading.Thread) -> Iterator[Event]:
        while True:
            alive = worker.is_alive()
            try:
                yield self._events.get(timeout=0.1)
            except queue.Empty:
                if not alive:
                    return
                yield Event("tick", self._stage)

    # On the thread

    def _work(self, spec: dict[str, Any], arguments: dict[str, Any]) -> None:
        from kfp import components, local

        root = self.folder.absolute()
        workspace = root / "workspace"
        workspace.mkdir()
        out = _Lines(lambda line: self._events.put(Event("line", self._stage, line)))
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(out))
                stack.enter_context(warnings.catch_warnings())
                stack.enter_context(kfp_local.containers_by(self._container))
                warnings.simplefilter("ignore")
                stack.enter_context(kfp_local.conditions_found(self._unresolved))
                stack.enter_context(_logged(out))
                options = {key: value for key, value in self.options.items() if key != "volumes"}
                runner = local.DockerRunner(**options)
                local.init(
                    runner, pipeline_root=str(root / "tasks"), workspace_root=str(workspace), raise_on_error=False
                )
                components.load_component_from_text(yaml.safe_dump(spec))(**arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        finally:
            out.close()
            with contextlib.suppress(OSError):
                workspace.rmdir()

    def _container(self, function: RunContainer, words: dict[str, Any]) -> int:
        """One container, for kfp: its exit code."""
        command: list[str] = words["command"]
        task = docker_runner.task_of(command)
        if self._stopping.is_set():
            raise _Stop
        tasks = str(self.folder.absolute() / "tasks")
        volumes = {path: how for path, how in words["volumes"].items() if path == tasks} | self.options["volumes"]
        # KFP's command takes the place of the image's entry point, Docker's would be added to it.
        words |= {"entrypoint": command[:1], "command": command[1:], "volumes": volumes}
        words["labels"] = {**words.get("labels", {}), STAGE_LABEL: task.stage}
        if function is docker_runner.run_container:  # kfp's own pulls what it does not find by a name
            words["image"] = self.images.get(words["image"], words["image"])
        self._stage = task.stage
        self._events.put(Event("running", task.stage))
        try:
            code = function(**words)
        finally:
            self._stage = ""
        self._ended(task, code)
        return code

    def _unresolved(self, name: str) -> NoReturn:
        message = f"kfp.local does not find {name}, on which a part of the pipeline depends"
        self.error = MillraceError(message, kfp_local.SUPPORTED)
        raise _Stop

    def _ended(self, task: Task, code: int) -> None:
        if self._stopping.is_set():
            raise _Stop
        if "proceed" in task.parameters:
            with contextlib.suppress(OSError):
                self.proceed = task.parameters["proceed"].read_text(encoding="utf-8").strip()
        for port, path in task.outputs.items():
            if path.exists() and task.stage in STAGES and port in STAGES[task.stage].outputs:
                link = self.folder / port
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(path, self.folder.absolute()))
        if code:
            self.failures.append((task.stage, code))
        self._events.put(Event("failed" if code else "done", task.stage))
        if not code and task.stage == self.until:
            raise _Stop

    # Signals

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self._hurry.set()  # asked twice: do not wait any longer
        else:
            self.signal = number
            self._stopping.set()

    def _stop_containers(self, worker: threading.Thread) -> None:
        """Once asked to stop: SIGTERM to the container that runs, and to one that was just about to start."""
        import docker

        while not self._stopping.wait(timeout=0.5):
            if not worker.is_alive():
                return
        if not worker.is_alive():
            return
        with contextlib.closing(docker.from_env()) as client:
            while worker.is_alive():
                for container in docker_runner.containers_of(client, self.folder.name):
                    self._stop(container, worker)
                worker.join(timeout=0.2)

    def _stop(self, container: Any, worker: threading.Thread) -> None:
        """SIGTERM, the grace, and the end; the thread is done as soon as the container is."""
        from docker.errors import APIError

        told = False
        for _ in range(int(GRACE_S / 0.1)):
            if not told:
                with contextlib.suppress(APIError):
                    container.kill("SIGTERM")
                    told = True
            worker.join(timeout=0.1)
            if self._hurry.is_set() or not worker.is_alive():
                break
        docker_runner.remove([container])


@contextlib.contextmanager
def _logged(stream: TextIO) -> Iterator[None]:
    """What kfp logs where it has no handler of its own goes to the stream as well, not to stderr."""
    logger, handler = logging.getLogger(), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Lines(io.StringIO):
    """A stream that hands on each line."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._on_line(line.rstrip("\r").rsplit("\r", 1)[-1])
        return len(text)

    def close(self) -> None:
        if self._rest:
            self._on_line(self._rest)
        self._rest = ""
