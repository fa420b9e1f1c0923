"""The cluster engine for teams without Kubeflow Pipelines: `millrace run --engine kubernetes`.

The stages run one after the other as jobs of the cluster, started by a coordinator that works there as well. The terminal
only follows: Ctrl-C detaches it, and `--attach` comes back.
"""

from __future__ import annotations

import collections
import json
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path, PurePosixPath
from typing import Any

from components.launch import chain_facts, chain_job, chain_plan, observe
from components.launch.api import Api
from components.launch.chain_log import Event, Facts
from components.launch.spec import PARAMS_ENV
from pipelines import cluster_runs, local, project, screen
from pipelines.cluster_follow import Following
from pipelines.dvcfile import KUBERNETES
from trainer import signals, storage
from trainer.config import Params
from trainer.config.load import load, validate
from trainer.config.text import parse_yaml
from trainer.errors import EXIT_OK, EXIT_REFUSED, ConfigError, MillraceError, redact
from trainer.stage import STAGES

LATEST = f"{KUBERNETES}/latest"
LOG = "run.log"
COMMAND = "run --engine kubernetes"


def run(args: Namespace) -> int:
    """What the command line asks for; returns the exit status of the stage that failed, or what the gate decided.

    Raises:
        ConfigError: a parameter is wrong, or there is no such run; nothing was started.
        MillraceError: the cluster does not answer, or refuses.
    """
    asked = [name for name in ("attach", "resume", "cancel") if getattr(args, name) is not None] + ["runs"] * args.runs
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]}: only one of them at a time", "leave one out")
    words = [*([getattr(args, asked[0])] if asked and asked != ["runs"] else []), *args.overrides]
    if asked and (words := [word for word in words if "=" in word or word in args.overrides]):
        hint = f"start another run: {screen.program()} {COMMAND} {shlex.join(words)}"
        raise ConfigError(f"--{asked[0]} with {words[0]}: the parameters of a run never change", hint)
    project.require_installed("--engine kubernetes", "kubernetes")
    until = args.until or ""
    if not asked:
        params = _settings(args.overrides, until)  # what is wrong is said before the cluster is asked
    api = Api.connect(args.namespace or "")
    if args.runs:
        return _list(api)
    if not asked:
        job = cluster_runs.start(api, params, until)
    else:
        job = cluster_runs.find(api, getattr(args, asked[0]))
        if asked == ["cancel"]:
            cluster_runs.cancel(api, chain_job.run_of(job))
            print(f"removed run {chain_job.run_of(job)}: its jobs and pods; what it stored stays")
            return EXIT_OK
        if asked == ["resume"]:
            job = cluster_runs.resume(api, job, until)
    name = chain_job.run_of(job)
    if args.detach:
        print(
            f"run {name} in namespace {api.namespace}\ngo on with: {screen.program()} {_words(api, args)} --attach {name}"
        )
        return EXIT_OK
    return _Terminal(api, job, _words(api, args)).follow()


def _words(api: Api, args: Namespace) -> str:
    """The command for this engine and namespace."""
    return f"{COMMAND} --namespace {api.namespace}" if args.namespace else COMMAND


def _settings(overrides: list[str], until: str) -> Params:
    """params.yaml with overrides, written there as by the other engines, as a run in pods takes it."""
    folder = Path()
    project.require(folder)
    params = chain_plan.settled(load(folder / project.PARAMS, overrides))
    local.check_ranks(params, until, nodes=params.cluster.job.training_nodes)
    with project.held(folder):
        words = [*overrides, *local.model_of_new_source(folder, overrides)]
        params = chain_plan.settled(load(folder / project.PARAMS, words))
        project.write_params(folder, words)
    return params


def _list(api: Api) -> int:
    jobs = cluster_runs.coordinators(api)
    if not jobs:
        print(f"no runs in namespace {api.namespace}", file=sys.stderr)
    seen: dict[str, str] = {}
    for job in jobs:
        run = chain_job.run_of(job)
        seen[run] = f"{run:<28} {cluster_runs.state(job):<8} {job['metadata']['creationTimestamp']}"
    for line in reversed(seen.values()):
        print(line)
    return EXIT_OK


class _Terminal:
    """Shows a run until it ends or the person at the terminal goes away."""

    def __init__(self, api: Api, job: dict[str, Any], command: str) -> None:
        self.api, self.job, self.command = api, job, command
        self.run = chain_job.run_of(job)
        self.params = _params_of(job)
        self.folder = Path(KUBERNETES) / self.run
        with storage.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.board = screen.Board([chain_plan.CONFIGURE, *STAGES], out=self.folder)
        self.tail: collections.deque[str] = collections.deque(maxlen=screen.TAIL)
        self.shown: set[str] = set()  # stages that are done
        self.stage, self.started = "", 0.0
        self.failed: Event | None = None
        self.end: Event | None = None
        self.signal = 0

    def follow(self) -> int:
        """Show the run; returns the exit status."""
        paint, params = self.board.paint, self.params
        about = f"{params.promote.model}  {paint(redact(params.data.source), 'dim')}  " if params else ""
        print(f"{paint('millrace', 'bold')} {about}"
              f"{paint(f'run {self.run} in namespace {self.api.namespace}', 'dim')}", flush=True)  # fmt: skip
        with signals.caught(self._on_signal, *signals.END):
            self._read()
        if self.signal:
            sys.stderr.write(
                f"\ndetached; the run goes on\n  fix: come back with `{screen.program()} {self.command} --attach {self.run}`, "
                f"or end it with `--cancel {self.run}`\n"
            )
            return 128 + self.signal
        assert self.end is not None
        return self._explain(self.failed) if self.failed else self._last(self.end)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number

    def _read(self) -> None:
        events = Following(self.api, self.job["metadata"]["name"]).events()
        with open(self.folder / LOG, "w", encoding="utf-8", buffering=1) as log:
            try:
                for event in events:
                    if self.signal:
                        return
                    if event.text:
                        log.write(screen.ESCAPES.sub("", event.text) + "\n")
                    self._show(event)
            finally:
                events.close()
                self.board.end()

    def _show(self, event: Event) -> None:
        stage, board = event.stage, self.board
        keep(self.folder, event.facts)
        if event.kind == "tick":
            board.tick(self.stage)
        elif event.kind == "line":
            text = event.text.removeprefix(f"{self.stage}: ") if self.stage else event.text
            self.tail.append(text)
            board.line(self.stage, text)
        elif event.kind == "waiting":
            board.line(self.stage, event.text)
        elif event.kind == "running" and stage not in self.shown and stage != self.stage:
            self.stage, self.started = stage, event.at
            self.tail.clear()
            board.start(stage, max(time.time() - event.at, 0.0))
        elif event.kind in ("done", "kept") and stage not in self.shown:
            if event.kind == "kept" and stage != self.stage:
                board.restored(stage)
            else:
                board.done(stage, event.at - self.started if event.kind == "done" else None)
            self.shown.add(stage)
            self.stage = ""
        elif event.kind == "failed":
            self.failed, self.stage = event, ""
            board.failed(stage, event.code)
        elif event.kind == "end":
            self.end = event

    def _explain(self, failed: Event) -> int:
        """Tell why the run failed; returns its exit status."""
        paint, say = screen.Paint(sys.stderr), sys.stderr.write
        sys.stdout.flush()
        for line in self.tail if self.board.live else ():
            say(f"  {paint('|', 'dim')} {line}\n")
        say(screen.ended(paint, failed.stage, failed.code))
        say(f"error: {failed.text}\n")
        rest = [stage for stage in self.board.stages if stage not in self.shown and stage != failed.stage]
        if rest:
            say(f"  not started: {', '.join(rest)}\n")
        say(f"  its output: {self.folder / LOG}; where the cluster is put right, `{screen.program()} {self.command} --resume "
            f"{self.run}` goes on with the same parameters\n")  # fmt: skip
        return failed.code

    def _last(self, end: Event) -> int:
        paint = self.board.paint
        promotion = storage.read_json(self.folder / "promotion" / "promotion.json")
        if end.code not in (EXIT_OK, EXIT_REFUSED) or "promote" not in self.shown or not promotion:
            print(f"  {end.text[:1].upper()}{end.text[1:]}: run {self.run}")
            return end.code
        _point_latest(self.folder)
        took = max(end.at - observe.seconds(self.job["metadata"]["creationTimestamp"]), 0.0)
        there = chain_plan.root(self.params, self.run) if self.params else ""
        for line in screen.last_screen(Path(), paint, took, len(self.shown), out=LATEST, there=there, run=self.command):
            print(line)
        sys.stdout.flush()
        return end.code


def _params_of(job: dict[str, Any]) -> Params | None:
    """The configuration of a run that this engine started; None for a CronJob's, whose lies elsewhere."""
    for each in job["spec"]["template"]["spec"]["containers"][0].get("env", []):
        if each["name"] == PARAMS_ENV and each.get("value"):
            return validate(parse_yaml(each["value"].replace("$$", "$"), "the run"), "the run")
    return None


def keep(folder: Path, facts: Facts) -> None:
    """Write the small files of what a stage made below the run's folder here."""
    for name, content in facts.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise MillraceError(f"the coordinator names {name}", "do not trust this cluster")
        data = chain_facts.unpacked(content) if name == chain_facts.PAGE else json.dumps(content).encode()
        with storage.explained(folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(folder / name, data)


def _point_latest(folder: Path) -> None:
    """Let out/kubernetes/latest be the run that has just ended well."""
    aside = folder.with_name(f".{folder.name}")
    with storage.explained(folder):
        aside.unlink(missing_ok=True)
        aside.symlink_to(folder.name)
        aside.replace(LATEST)
