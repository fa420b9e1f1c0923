"""What the commands of `millrace` that talk to Kubeflow Pipelines do; each is `command(args) -> exit status`."""

from __future__ import annotations

import datetime as dt
import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path

from pipelines import client, compiler, runlogs, runview
from pipelines.kfp_api import Api, Json
from pipelines.kfp_target import target
from pipelines.project import PARAMS, require_installed
from pipelines.screen import program, seconds
from trainer import storage
from trainer.config import Params
from trainer.config.load import load
from trainer.config.names import nearest
from trainer.configure import is_shared, require_store
from trainer.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, redact

TIME = "%Y-%m-%d %H:%M:%S UTC"


def compile(args: Namespace) -> int:
    """`millrace compile`."""
    require_installed("millrace compile", "kfp", "kfp.kubernetes")
    params = params_of(args.overrides)
    _warn_of_defaults()
    if args.output == "-":
        print(compiler.text(params), end="")
        return EXIT_OK
    compiler.write(params, Path(args.output))
    print(f"wrote {args.output}: upload it in the UI, or start a run with `{program()} submit`")
    return EXIT_OK


def submit(args: Namespace) -> int:
    """`millrace submit`."""
    params, api = params_of(args.overrides), api_of(args)
    warn(params)
    documents, arguments = compiler.package(params), compiler.arguments(params)
    name = args.name or f"{params.promote.model}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}"
    try:
        run = client.submit(api, documents, arguments, name)
    except KeyboardInterrupt:
        print(f"stopped: the run may have been started all the same: see `{program()} runs`", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"run {run['run_id']}  {name}\n{client.url(api, run['run_id'])}", flush=True)
    if args.no_wait:
        print(f"go on with: {program()} status {run['run_id']} --watch")
        return EXIT_OK
    return _wait(api, run["run_id"], client.pipeline_spec(documents), args.timeout)


def _wait(api: Api, run_id: str, spec: Json, timeout_s: float | None) -> int:
    """Watch a run to its end.

    Raises:
        RunFailed: it did not succeed; the message names the tasks that failed.
    """
    view = runview.View()
    try:
        run = client.wait(api, run_id, spec, view, timeout_s)
    except KeyboardInterrupt:
        view.end()
        print(
            f"\nstopped watching; the run goes on: `{program()} status {run_id}`, `{program()} cancel {run_id}`",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    finally:
        view.end()
    found = runview.tasks(spec, run, dt.datetime.now(dt.UTC))
    state, took = str(run["state"]), _took(run)
    if state not in ("SUCCEEDED", "SKIPPED"):
        failed = runview.failed(found)
        said = (run.get("error") or {}).get("message") or ""
        what = (
            f"failed: {', '.join(failed)}" if failed else said or "it was cancelled, or its pods could not be started"
        )
        log = (
            f"{program()} logs {run_id} {failed[0]}"
            if failed
            else f"{program()} status {run_id}; {client.url(api, run_id)}"
        )
        raise client.RunFailed(f"run {run_id}: {state}{took}; {what}", log)
    print(f"run {state}{took}{_nothing_new(found)}")
    return EXIT_OK


def _nothing_new(found: list[runview.Task]) -> str:
    stages = [task for task in found if task.name in ("preprocess", "promote")]
    return ": nothing new, so nothing was trained" if stages and all(task.state == "skipped" for task in stages) else ""


def status(args: Namespace) -> int:
    """`millrace status`."""
    api = api_of(args)
    run = client.resolve(api, args.run)
    spec = client.spec_of(api, run)
    print(f"run {run['run_id']}  {run.get('display_name')}\n{client.url(api, run['run_id'])}", flush=True)
    if args.watch:
        return _wait(api, run["run_id"], spec, None)
    view = runview.View()
    for task in runview.tasks(spec, run, dt.datetime.now(dt.UTC)):
        print(runview.line(task, view.paint))
    said = (run.get("error") or {}).get("message")
    print(f"run {run.get('state')}{_took(run)}{': ' + redact(said) if said else ''}")
    return EXIT_OK


def runs(args: Namespace) -> int:
    """`millrace runs`."""
    api = api_of(args)
    found = list(islice(client.runs(api), max(args.limit, 0)))
    if not found:
        print(f"no runs in experiment {api.target.experiment}")
        return EXIT_OK
    print(f"{'run':<14}{'state':<11}{'created':<25}{'took':>9}  name")
    for run in found:
        created = runview.time_of(run.get("created_at"))
        when = created.strftime(TIME) if created else ""
        took = _took(run).removeprefix(" in ")
        print(
            f"{run['run_id'][:13]:<14}{run.get('state') or '':<11}{when:<25}{took:>9}  {run.get('display_name') or ''}"
        )
    return EXIT_OK


def cancel(args: Namespace) -> int:
    """`millrace cancel`."""
    api = api_of(args)
    run = client.resolve(api, args.run)
    if client.cancel(api, run):
        print(f"run {run['run_id']}: ending; it will be listed as FAILED, as cancelled runs are")
    else:
        print(f"run {run['run_id']}: has ended: {run.get('state')}")
    return EXIT_OK


def logs(args: Namespace) -> int:
    """`millrace logs`."""
    api = api_of(args)
    run = client.resolve(api, args.run)
    spec = client.spec_of(api, run)
    found = runview.tasks(spec, run, dt.datetime.now(dt.UTC))
    wanted = _wanted(found, args.task)
    if args.follow:
        return _follow(api, run, spec, wanted)
    for task in wanted:
        text = runlogs.read(api, run, spec, task)
        if len(wanted) > 1:
            print(f"=== {task.name} ===")
        _print(text)
    return EXIT_OK


def _wanted(found: list[runview.Task], name: str) -> list[runview.Task]:
    """The tasks whose logs are printed."""
    if name:
        named = [task for task in found if task.name == name]
        if not named:
            known = nearest(name, [task.name for task in found])
            raise ConfigError(f"task {name}: not in this run; {known}", "see `millrace status`")
        return named
    for states in (("failed",), ("running",), ("done", "stopped")):
        if some := [task for task in found if task.state in states]:
            return some
    raise ConfigError(
        "no task of this run has a log: none has run yet, or all came from the cache", "see `millrace status`"
    )


def _follow(api: Api, run: Json, spec: Json, wanted: list[runview.Task]) -> int:
    """Print what is new in the logs of some tasks until they have ended; the server has no way to follow."""
    printed = dict.fromkeys([task.name for task in wanted], "")
    while True:
        for task in wanted:
            before = printed[task.name]
            try:
                text = runlogs.read(api, run, spec, task)
            except runlogs.NoLog:
                if task.state not in (*runview.MOVING, "waiting") and not before:
                    raise
                continue  # its pod has not started yet, or has gone
            _print(text[len(before) :] if text.startswith(before) else text)
            printed[task.name] = text
        if all(task.state not in (*runview.MOVING, "waiting") for task in wanted):
            return EXIT_OK
        time.sleep(client.POLL_S)
        run = client.get(api, run["run_id"])
        wanted = [task for task in runview.tasks(spec, run, dt.datetime.now(dt.UTC)) if task.name in printed]


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def warn(params: Params) -> None:
    """Say what a run on a cluster will not find, and what comes of it.

    Raises:
        ConfigError: the data is on this machine, or a job of the cluster has no place to put what it makes.
    """
    _warn_of_defaults()
    require_store("cluster.store", params.cluster.store, params)
    source = params.data.source
    if not is_shared(source, params.cluster) and not source.startswith(("builtin:", "dvc:")) and storage.exists(source):
        raise ConfigError(
            f"data.source: {redact(source)} is of this machine, pods do not see it",
            "copy it to an object store, or to the volume of cluster.claim, and name it there: data.source=s3://bucket/data.jsonl",
        )
    for key, uri, what in (
        ("data.source", params.data.source, "preprocess fails unless the image has it; give it as s3://bucket/data.jsonl"),
        ("promote.registry", params.promote.registry, "no champion is compared with or kept; s3://bucket/registry keeps one"),
    ):  # fmt: skip
        if not is_shared(uri, params.cluster) and not uri.startswith(("builtin:", "dvc:")):
            print(f"note: {key}={redact(uri)} is of this machine, pods do not see it:\n  {what}", file=sys.stderr)


def _warn_of_defaults() -> None:
    if not Path(PARAMS).is_file():
        print(f"note: no {PARAMS} here: all parameters have their defaults", file=sys.stderr)


def _took(run: Json) -> str:
    begun, ended = runview.time_of(run.get("created_at")), runview.time_of(run.get("finished_at"))
    return f" in {seconds((ended - begun).total_seconds())}" if begun and ended and ended >= begun else ""


def params_of(overrides: list[str]) -> Params:
    """params.yaml of the working folder, or the defaults where there is none, with overrides."""
    return load(PARAMS if Path(PARAMS).is_file() else None, overrides)


def api_of(args: Namespace) -> Api:
    """The server that the flags and the environment name."""
    where = target(args.host, args.namespace, args.experiment, args.token_file, args.cookies_file, args.ca_file)
    require_installed(f"millrace {args.command}", "kfp_server_api")
    return Api(where)
