"""What `millrace schedule` does: `schedule(args) -> exit status`. How a schedule is changed is in schedule.py."""

from __future__ import annotations

import datetime as dt
import re
from argparse import Namespace
from itertools import islice

from pipelines import compiler, cron
from pipelines import schedule as schedules
from pipelines.cli_kfp import ACTIONS
from pipelines.commands_kfp import TIME, api_of, params_of, warn
from trainer.config import Params
from trainer.config.names import nearest
from trainer.configure import is_shared
from trainer.errors import EXIT_OK, ConfigError, redact


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
    params = params_of(args.overrides)
    name = args.name or _schedule_name(params)
    schedules.check_name(name)
    _require_registry(params)
    warn(params)
    api = api_of(args)
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
    api = api_of(args)
    if action == "ls":
        return _list(schedules.listed(api))
    name = name or _schedule_name(params_of([]))
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
        print(f"{each.name:<24}{state:<9}{each.cron:<22}{due.strftime(TIME) if due else ''}".rstrip())
    for each in found:
        if each is not newest[each.name]:
            print(f"  an earlier version of {each.name} is still there ({'on' if each.enabled else 'disabled'}); "
                  "run its `millrace schedule --cron ...` again")  # fmt: skip
    return EXIT_OK


def _print_times(times: cron.Cron, count: int) -> None:
    for due in islice(times.times(dt.datetime.now(dt.UTC)), max(count, 0)):
        print(f"  {due.strftime(TIME)}")


def _schedule_name(params: Params) -> str:
    """The model's name as a schedule's."""
    return re.sub(r"[^a-z0-9]+", "-", params.promote.model.lower()).strip("-")[:52].strip("-") or "millrace"


def _require_registry(params: Params) -> None:
    """Each scheduled run compares itself with the champion, so all must find the same registry."""
    uri = params.promote.registry
    if not is_shared(uri, params.cluster):
        raise ConfigError(
            f"promote.registry: {redact(uri)} is a path of this machine, which no pod can see",
            "promote.registry=s3://bucket/registry, or a path below cluster.mount with cluster.claim",
        )
