"""What the commands of `millrace` that talk to Kubeflow Pipelines do; each is `command(args) -> exit status`."""

from __future__ import annotations

import datetime as dt
import re
import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path

from pipelines import client, compiler, cron, runlogs, runview
from pipelines import schedule as schedules
from pipelines.cli_kfp import ACTIONS
from pipelines.kfp_api import Api, Json
from pipelines.kfp_target import target
from pipelines.project import PARAMS
from pipelines.screen import program, seconds
from trainer import storage
from trainer.config import Params
from trainer.config.load import load
from trainer.config.names import nearest
from trainer.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, redact

_TIME = "%Y-%m-%d %H:%M:%S UTC"


def compile(args: Namespace) -> int:
    """`millrace compile`."""
    params = _params(args.overrides)
    if args.output == "-":
        print(compiler.text(params), end="")
        return EXIT_OK
    compiler.write(params, Path(args.output))
    print(f"wrote {args.output}: upload it in the UI, or start a run with `{program()} submit`")
    return EXIT_OK


def submit(args: Namespace) -> int:
    """`millrace submit`."""
    params, api = _params(args.overrides), _api(args)
    _warn_of_local_paths(params)
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
    api = _api(args)
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
    api = _api(args)
    found = list(islice(client.runs(api), max(args.limit, 0)))
    if not found:
        print(f"no runs in experiment {api.target.experiment}")
        return EXIT_OK
    print(f"{'run':<14}{'state':<11}{'created':<25}{'took':>9}  name")
    for run in found:
        created = runview.time_of(run.get("created_at"))
        when = created.strftime(_TIME) if created else ""
        took = _took(run).removeprefix(" in ")
        print(
            f"{run['run_id'][:13]:<14}{run.get('state') or '':<11}{when:<25}{took:>9}  {run.get('display_name') or ''}"
        )
    return EXIT_OK


def cancel(args: Namespace) -> int:
    """`millrace cancel`."""
    api = _api(args)
    run = client.resolve(api, args.run)
    if client.cancel(api, run):
        print(f"run {run['run_id']}: ending; it will be listed as FAILED, as cancelled runs are")
    else:
        print(f"run {run['run_id']}: has ended: {run.get('state')}")
    return EXIT_OK


def logs(args: Namespace) -> int:
    """`millrace logs`."""
    api = _api(args)
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


def schedule(args: Namespace) -> int:
    """`millrace schedule`."""
    # Words after an option come with the overrides.
    words = [*args.words, *(word for word in args.overrides if "=" not in word)]
    if words:
        action = words[0]
        if action not in ACTIONS:
            raise ConfigError(
                f"schedule {action}: no such action; {nearest(action, ACTIONS)}", "see `millrace schedule --help`"
            )
        if (args.cron and action != "next") or len(words) > 2 or any("=" in word for word in args.overrides):
            raise ConfigError(f"schedule {action}: takes a name and nothing else", "see `millrace schedule --help`")
        return _act(args, action, (words[1:] or [args.name])[0])
    if not args.cron:
        raise ConfigError(
            "schedule: no times", 'give --cron "0 3 * * 1" (Mondays 03:00 UTC), or one of ls, pause, resume, rm, next'
        )
    return _reconcile(args)


def _reconcile(args: Namespace) -> int:
    times = cron.parse(args.cron)
    params = _params(args.overrides)
    name = args.name or _schedule_name(params)
    schedules.check_name(name)
    _require_registry(params)
    _warn_of_local_paths(params)
    api = _api(args)
    documents = compiler.package(params)
    arguments = compiler.arguments(params) | {"only_if_new": not args.always}
    outcome = schedules.reconcile(api, name, documents, times, arguments)
    paused = "" if outcome.schedule.enabled else " (paused: `millrace schedule resume` starts it)"
    print(f"schedule {name}: {outcome.what}{paused}")
    if outcome.left:
        print(
            "  a run of its earlier version is active; that version is disabled, and deleted by a later `millrace schedule`"
        )
    _print_times(times, 3)
    return EXIT_OK


def _act(args: Namespace, action: str, name: str) -> int:
    """`millrace schedule ls|pause|resume|rm|next`."""
    if action == "next" and args.cron:
        _print_times(cron.parse(args.cron), args.count)
        return EXIT_OK
    api = _api(args)
    if action == "ls":
        return _list(schedules.listed(api))
    name = name or _schedule_name(_params([]))
    if action == "pause":
        schedules.pause(api, name)
        print(f"schedule {name}: paused; a run that is active goes on")
    elif action == "resume":
        found = schedules.resume(api, name)
        print(f"schedule {name}: starts runs again; if it missed some, it starts one at once")
        _print_times(cron.parse(found.cron), 3)
    elif action == "rm":
        schedules.delete_all(api, name)
        print(f"schedule {name}: deleted; its runs are kept")
    else:
        found = schedules.only(api, name)
        if not found.enabled:
            print(f"schedule {name}: paused; when it runs again:")
        _print_times(cron.parse(found.cron), args.count)
    return EXIT_OK


def _list(found: list[schedules.Schedule]) -> int:
    newest = {each.name: each for each in found}
    if not newest:
        print("no schedules")
    else:
        print(f"{'schedule':<24}{'state':<9}{'cron (UTC)':<22}next")
    for each in newest.values():
        due = cron.parse(each.cron).next(dt.datetime.now(dt.UTC)) if each.enabled else None
        state = "on" if each.enabled else "paused"
        print(f"{each.name:<24}{state:<9}{each.cron:<22}{due.strftime(_TIME) if due else ''}".rstrip())
    for each in found:
        if each is not newest[each.name]:
            print(f"  an earlier version of {each.name} is still there ({'on' if each.enabled else 'disabled'}); "
                  "run its `millrace schedule --cron ...` again")  # fmt: skip
    return EXIT_OK


def _print_times(times: cron.Cron, count: int) -> None:
    for due in islice(times.times(dt.datetime.now(dt.UTC)), max(count, 0)):
        print(f"  {due.strftime(_TIME)}")


def _schedule_name(params: Params) -> str:
    """The model's name as a schedule's."""
    return re.sub(r"[^a-z0-9]+", "-", params.promote.model.lower()).strip("-")[:52].strip("-") or "millrace"


def _require_registry(params: Params) -> None:
    """Each scheduled run compares itself with the champion, so all must find the same registry."""
    uri = params.promote.registry
    if not _is_shared(params, uri):
        raise ConfigError(
            f"promote.registry: {redact(uri)} is a path of this machine, which no pod can see",
            "promote.registry=s3://bucket/registry, or a path below cluster.mount with cluster.claim",
        )


def _is_shared(params: Params, uri: str) -> bool:
    return storage.is_remote(uri) or bool(params.cluster.claim and uri.startswith(f"{params.cluster.mount}/"))


def _warn_of_local_paths(params: Params) -> None:
    """Say which paths of this machine a run on a cluster will not find."""
    for key, uri in (("data.source", params.data.source), ("promote.registry", params.promote.registry)):
        if not _is_shared(params, uri) and not uri.startswith(("builtin:", "dvc:", "hf:")):
            print(f"note: {key}={redact(uri)} is a path of this machine; the pods do not see it", file=sys.stderr)


def _took(run: Json) -> str:
    begun, ended = runview.time_of(run.get("created_at")), runview.time_of(run.get("finished_at"))
    return f" in {seconds((ended - begun).total_seconds())}" if begun and ended and ended >= begun else ""


def _params(overrides: list[str]) -> Params:
    """params.yaml of the working folder, or the defaults where there is none, with overrides."""
    return load(PARAMS if Path(PARAMS).is_file() else None, overrides)


def _api(args: Namespace) -> Api:
    return Api(target(args.host, args.namespace, args.experiment, args.token_file, args.cookies_file, args.ca_file))
