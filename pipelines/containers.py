"""The container engine: `millrace run --engine docker`, the compiled pipeline in containers, without a cluster.

kfp.local walks the graph, Docker or podman runs each stage in the image in which the cluster runs it. What a run makes
lies in out/containers/RUN, with a link for each artifact named as the laptop engine names its folder.
"""

from __future__ import annotations

import collections
import json
import secrets
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import docker_runner, dvcfile, local, project, sandbox, screen, sockets
from pipelines.chain import Chain
from pipelines.dvcfile import CONTAINERS
from pipelines.engine import Event
from trainer import storage
from trainer.config import Params
from trainer.config.job import Job
from trainer.config.load import load
from trainer.errors import EXIT_OK, EXIT_REFUSED, ConfigError, MillraceError, redact

if TYPE_CHECKING:
    from docker import DockerClient

LATEST = f"{CONTAINERS}/latest"
LOG = "run.log"
# Placeholders that kfp.local does not know: it would stop at them.
_SCHEDULED = "{{$.pipeline_job_schedule_time_utc}}"
_CREATED = "{{$.pipeline_job_create_time_utc}}"


def run(overrides: list[str], *, until: str = "") -> int:
    """Run the whole chain in containers; returns the exit status of the stage that failed, or 0.

    Args:
        overrides: words `section.key=value`, written to params.yaml.
        until: a stage; none is started after it.

    Raises:
        ConfigError: an override is wrong; nothing was written.
        DataError: the raw data is not there; nothing was written.
        MillraceError: no container engine answers, or an image is missing.
    """
    folder = Path()
    project.require(folder)
    project.require_installed("--engine docker", "docker", "kfp")
    dvcfile.render(load(folder / project.PARAMS, overrides))  # what is wrong is said before a file is written
    with project.held(folder), sockets.terminated(), sockets.service() as client:
        words = [*overrides, *local.model_of_new_source(folder, overrides)]
        params = load(folder / project.PARAMS, words)
        # Nor is one written with images that are not there, or with credentials that would be shown.
        spec, arguments = _pipeline(params)
        images = sandbox.pin_images(client, spec)
        project.configure(folder, words)
        return _run(client, params, spec, arguments, images, until)


def _run(
    client: DockerClient,
    params: Params,
    spec: dict[str, Any],
    arguments: dict[str, Any],
    images: dict[str, str],
    until: str,
) -> int:
    started = time.monotonic()
    removed = docker_runner.remove_leftovers(client)
    stages = stages_of(spec)
    source = params.data.source
    if source.startswith(dvcfile.BUILTIN):
        stages = ["raw", *stages]
    if until and until not in stages:
        raise ConfigError(f"--until {until}: this pipeline has no such stage", f"it has {', '.join(stages)}")
    folder = _make_folder()
    board = screen.Board(stages, out=folder)
    paint = board.paint
    print(f"{paint('millrace', 'bold')} {params.promote.model}  {paint(redact(source), 'dim')}  "
          f"{paint(f'in containers, {folder}', 'dim')}", flush=True)  # fmt: skip
    if asked := _not_here(params.cluster.job):
        print(f"  {asked}: not here, where no cluster is; each stage works in its own container", flush=True)
    if removed:
        print(f"  removed {removed} container{'s' * (removed > 1)} that a killed run left", flush=True)
    if "raw" in stages:
        _write_raw(board, source)
        if until == "raw":
            print(f"  Stopped after raw, as asked: {dvcfile.raw_file(source)}")
            return EXIT_OK
    with sandbox.options(client, params, folder) as options:
        chain = Chain(folder, options, until, images)
        tail = _follow(chain, client, spec, arguments, board, sandbox.secret_values(params))
    if chain.signal or chain.failed or chain.error:
        return _explain(chain, tail if board.live else [], [stage for stage in stages if stage not in board.ran])
    if until:
        print(f"  Stopped after {until}, as asked: {folder}")
        return EXIT_OK
    if chain.proceed == "false":
        print(f"  {paint('Up to date', 'bold', 'green')}: there is nothing new to train on.")
        return EXIT_OK
    promotion = storage.read_json(folder / "promotion" / "promotion.json")
    if not promotion:
        raise MillraceError(f"{folder}: the run ended without a decision", f"see {folder / LOG}")
    _point_latest(folder)
    return _last_screen(promotion, params, paint, time.monotonic() - started, len(board.ran))


def _pipeline(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline as it is run here, and its inputs.

    Without a cluster nothing is launched: each stage works in its own container, whatever cluster.job says. A built-in
    source is read from the file that the stage `raw` writes, as on a laptop. Nothing is retried by kfp, which would
    repeat what cannot get better; the entry point in the container knows what is worth another try.
    """
    from pipelines import compiler

    source = params.data.source
    if source.startswith(dvcfile.BUILTIN):
        data = params.data.model_copy(update={"source": dvcfile.raw_file(source)})
        params = params.model_copy(update={"data": data})
    spec = compiler.spec(params.model_copy(update={"cluster": params.cluster.model_copy(update={"job": Job()})}))
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    spec = json.loads(json.dumps(spec).replace(_SCHEDULED, "").replace(_CREATED, now))
    for component in [spec["root"], *spec.get("components", {}).values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return spec, compiler.arguments(params)


def _not_here(job: Job) -> str:
    """What cluster.job asks for that takes a cluster, as words; empty if nothing."""
    kinds = [f"cluster.job.{name}={getattr(job, name)}" for name in job.launched]
    return ", ".join(kinds + [f"cluster.job.nodes={job.nodes}"] * (job.nodes > 1))


def stages_of(spec: dict[str, Any]) -> list[str]:
    """The stages of a pipeline, in the order in which they run: `configure` first, `finish` last."""
    from trainer.stage import STAGES

    executors = spec["deploymentSpec"]["executors"].values()
    containers = [each["container"] for each in executors if "container" in each]
    found = {
        docker_runner.task_of([*each.get("command", []), *each.get("args", [])]).stage: None for each in containers
    }
    order = ["configure", *STAGES]
    return sorted(found, key=lambda stage: (stage == "finish", order.index(stage) if stage in order else len(order)))


def _make_folder() -> Path:
    folder = Path(CONTAINERS) / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with storage.explained(folder):
        folder.mkdir(parents=True)
    return folder


def _write_raw(board: screen.Board, source: str) -> None:
    """Write a built-in source to its file by the very command that dvc.yaml has for it."""
    name = source.removeprefix(dvcfile.BUILTIN)
    words = [sys.executable, "-m", "trainer.data.builtin", name, "--out", dvcfile.raw_file(source)]
    board.start("raw")
    done = subprocess.run(words, env=project.environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        board.failed("raw", done.returncode)
        board.end()
        raise MillraceError(f"raw: {done.stderr.strip()}", "see the message")
    board.done("raw")


def _follow(
    chain: Chain,
    client: DockerClient,
    spec: dict[str, Any],
    arguments: dict[str, Any],
    board: screen.Board,
    hide: list[str],
) -> list[str]:
    """Run the chain, show it on the board and log it; returns the last lines of the last stage."""
    tail: collections.deque[str] = collections.deque(maxlen=screen.TAIL)
    with open(chain.folder / LOG, "w", encoding="utf-8", buffering=1) as log:
        try:
            for event in chain.run(client, spec, arguments):
                text = _hidden(event.text, hide)
                if event.text:
                    log.write(text + "\n")
                _show(event, text, board, tail, chain)
        finally:
            board.end()
    return list(tail)


def _hidden(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, "***")
    return redact(screen.ESCAPES.sub("", text))


def _show(event: Event, text: str, board: screen.Board, tail: collections.deque[str], chain: Chain) -> None:
    if event.kind == "running":
        if event.stage != "finish":
            tail.clear()
        board.start(event.stage)
    elif event.kind == "line" and event.stage:
        if not (chain.failed and event.stage == "finish"):
            tail.append(text)
        board.line(event.stage, text)
    elif event.kind == "done":
        board.done(event.stage)
    elif event.kind == "failed":
        board.failed(event.stage, dict(chain.failures)[event.stage])
    elif event.kind == "tick":
        board.tick(event.stage)


def _explain(chain: Chain, tail: list[str], rest: list[str]) -> int:
    """Tell why the run failed; returns its exit status."""
    paint, say = screen.Paint(sys.stderr), sys.stderr.write
    sys.stdout.flush()
    if chain.signal:
        say(
            f"\nstopped; its containers are removed\n  fix: the same command starts again; output: {chain.folder / LOG}\n"
        )
        return 128 + chain.signal
    for line in tail:
        say(f"  {paint('|', 'dim')} {line}\n")
    if not chain.failed:
        assert chain.error is not None
        raise chain.error
    stage, code = chain.failed
    say(screen.ended(paint, stage, code))
    if rest:
        say(f"  not started: {', '.join(rest)}\n")
    say(f"  its output: {chain.folder / LOG}\n")
    return code


def _point_latest(folder: Path) -> None:
    """Let out/containers/latest be the run that has just ended well."""
    aside = folder.with_name(f".{folder.name}")
    with storage.explained(folder):
        aside.unlink(missing_ok=True)
        aside.symlink_to(folder.name)
        aside.replace(LATEST)


def _last_screen(promotion: dict[str, Any], params: Params, paint: screen.Paint, took: float, ran: int) -> int:
    champion = local.present_champion(params)
    for line in screen.last_screen(Path(), paint, took, ran, champion=champion, out=LATEST, run="run --engine docker"):
        print(line)
    sys.stdout.flush()
    return EXIT_OK if promotion.get("decision") == "promoted" else EXIT_REFUSED
