"""Recurring runs that follow params.yaml: `millrace schedule`. One name, one schedule, whatever breaks off when.

The server has no call that changes a recurring run, only create, enable, disable and delete. A changed schedule is
therefore replaced: the new one is created disabled, with the next number of change and whether the old one was paused
in its description; the old one is disabled; the new one is enabled; the old one is deleted. `settle` finishes or takes
back what a crash left in between:

    old enabled,  new disabled    before the point of no return: the new one is deleted
    old disabled, new disabled    after it: the new one is enabled, if the old one was not paused; the old one is deleted
    old any,      new enabled     the old one is disabled and deleted

Deleting a recurring run whose run is active takes that run's pods with it (before 2.16 always): it then stays, disabled,
until a later command finds its runs done.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from dataclasses import dataclass, replace
from typing import Any

from pipelines.client import experiment, pipeline_spec
from pipelines.cron import Cron
from pipelines.kfp_api import Api, Json, KfpError, filter_
from pipelines.runview import FINAL
from trainer import __version__
from trainer.config.names import nearest
from trainer.errors import ConfigError

_MARK = re.compile(
    r"\[millrace schedule digest=(?P<digest>[0-9a-f]{32}) key=(?P<key>[0-9a-f]{12})"
    r" change=(?P<change>\d{1,9}) paused=(?P<paused>yes|no)\]"
)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class Schedule:
    """A recurring run of ours.

    Attributes:
        id: the server's.
        name: unique among schedules of an experiment.
        cron: six fields.
        enabled: whether it starts runs.
        digest: of pipeline, times and arguments.
        key: of the request that created it.
        change: how many of this name came before it.
        was_paused: whether the one before was paused.
        created: when, as the server writes it.
    """

    id: str
    name: str
    cron: str
    enabled: bool
    digest: str
    key: str
    change: int
    was_paused: bool
    created: str


@dataclass(frozen=True)
class Outcome:
    """What was done: `created`, `replaced` or `unchanged`; the schedule now; ids of old ones whose runs are active."""

    what: str
    schedule: Schedule
    left: tuple[str, ...] = ()


def digest_of(documents: list[Json], cron: Cron, arguments: Json) -> str:
    """What makes two schedules the same."""
    content = json.dumps([documents, cron.text, arguments], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def check_name(name: str) -> None:
    """Names become names of Kubernetes objects.

    Raises:
        ConfigError: this one cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name}: must be small letters, digits and `-`, at most 52", "such as weekly-retrain")


def listed(api: Api) -> list[Schedule]:
    """All schedules of the target's experiment, also those that were replaced, the older first."""
    parent = experiment(api)
    if not parent:
        return []
    found = [_read(each) for each in api.pages("/recurringruns", "recurringRuns", experiment_id=parent)]
    return _ordered([each for each in found if each])


def named(api: Api, name: str) -> list[Schedule]:
    """Those of a name, the older first.

    Raises:
        ConfigError: the name is taken by a recurring run that millrace has not made.
    """
    parent = experiment(api)
    if not parent:
        return []
    found = list(api.pages("/recurringruns", "recurringRuns", experiment_id=parent, filter=filter_(display_name=name)))
    found = [each for each in found if each.get("display_name") == name]
    if any(_read(each) is None for each in found):
        raise ConfigError(
            f"--name {name}: is a recurring run that millrace has not made", "take another --name, or delete that one"
        )
    return _ordered([ours for each in found if (ours := _read(each))])


def reconcile(api: Api, name: str, documents: list[Json], cron: Cron, arguments: Json) -> Outcome:
    """Make the server's schedule of this name what it is to be; does nothing if it is."""
    check_name(name)
    present, left = settle(api, named(api, name))
    digest = digest_of(documents, cron, arguments)
    if present and present.digest == digest:
        return Outcome("unchanged", present, left)
    content = {
        "pipeline_spec": pipeline_spec(documents),
        "runtime_config": {"parameters": arguments},
        "trigger": {"cron_schedule": {"cron": cron.text}},
    }
    new = _create(api, name, content, digest, present)
    # A look at what there is now ends the change, and a race with someone who does the same.
    now, left = settle(api, named(api, name), new.id if present else "")
    return Outcome("replaced" if present else "created", now or new, left)


def settle(api: Api, found: list[Schedule], new: str = "") -> tuple[Schedule | None, tuple[str, ...]]:
    """Leave one of several schedules of a name: the newest whose change was begun in earnest.

    Args:
        api: the server.
        found: the schedules of one name, the older first.
        new: id of one that was created just now, whose change is to go on.

    Returns:
        The one that is left, and the ids of disabled ones that stay until their runs are done.
    """
    found = list(found)
    while len(found) > 1 and found[-1].id != new and _is_draft(found):
        delete(api, found.pop().id)
    if not found:
        return None, ()
    last = found[-1]
    old = found[:-1]
    for each in old:
        if each.enabled:
            set_enabled(api, each.id, False)
    if old and not last.enabled and not last.was_paused:
        try:
            set_enabled(api, last.id, True)
        except KfpError:
            # Better the old times than none. Should this fail too, the next command finishes the change.
            if old[-1].enabled:
                set_enabled(api, old[-1].id, True)
            raise
        last = _with(last, enabled=True)
    left = tuple(each.id for each in old if not remove(api, each.id))
    return last, left


def _is_draft(found: list[Schedule]) -> bool:
    """Whether the newest was created for a change that then did not begin: an older one still runs."""
    last = found[-1]
    return last.change > 0 and not last.enabled and any(each.enabled for each in found[:-1])


def pause(api: Api, name: str) -> Schedule:
    """Start no more runs; those that are active go on.

    Where an older version waits for its runs to end, the schedule is made anew as a paused one: beside a disabled older
    one a disabled schedule would count as a change that broke off, and be enabled.

    Raises:
        ConfigError: there is no such schedule.
    """
    present, left = _present(api, name)
    if present.enabled:
        set_enabled(api, present.id, False)
    if left and not present.was_paused:
        server = api.get(f"/recurringruns/{present.id}")
        kept: Json = {key: server[key] for key in ("pipeline_spec", "runtime_config", "trigger") if key in server}
        made = _create(api, name, kept, present.digest, _with(present, enabled=False))
        remove(api, present.id)
        return made
    return _with(present, enabled=False)


def resume(api: Api, name: str) -> Schedule:
    """Start runs again.

    Raises:
        ConfigError: there is no such schedule.
    """
    present, _ = _present(api, name)
    if not present.enabled:
        set_enabled(api, present.id, True)
    return _with(present, enabled=True)


def only(api: Api, name: str) -> Schedule:
    """The schedule of a name, as it is.

    Raises:
        ConfigError: there is none.
    """
    found = named(api, name)
    if not found:
        raise _unknown(api, name)
    return found[-1]


def delete_all(api: Api, name: str) -> None:
    """Delete a schedule.

    Raises:
        ConfigError: there is no such schedule, or one of its runs is active; it is paused then.
    """
    found = named(api, name)
    if not found:
        raise _unknown(api, name)
    for each in found:
        if each.enabled:
            set_enabled(api, each.id, False)
    for each in found:
        if active := active_runs(api, each.id):
            why = f"schedule {name}: paused, not deleted: its run {active[0]} is active, and would go with it"
            raise ConfigError(why, f"wait for it, or `millrace cancel {active[0]}`; then run the same command again")
        delete(api, each.id)


def _present(api: Api, name: str) -> tuple[Schedule, tuple[str, ...]]:
    present, left = settle(api, named(api, name))
    if present is None:
        raise _unknown(api, name)
    return present, left


def _unknown(api: Api, name: str) -> ConfigError:
    known = {each.name for each in listed(api)}
    if not known:
        where = f"experiment {api.target.experiment} has no schedules"
        return ConfigError(f"schedule {name}: not there; {where}", 'make one: `millrace schedule --cron "0 3 * * 1"`')
    return ConfigError(f"schedule {name}: not there; {nearest(name, known)}", "see `millrace schedule ls`")


def _create(api: Api, name: str, content: Json, digest: str, old: Schedule | None) -> Schedule:
    """Create it: enabled if it is the first of its name, else as a disabled one that takes the old one's place."""
    key = uuid.uuid4().hex[:12]  # the server may keep no more than 255 characters of a description
    mark = f"digest={digest} key={key} change={old.change + 1 if old else 0} paused={'yes' if old and not old.enabled else 'no'}"
    parent = experiment(api, create=True)
    body: Json = {
        "display_name": name,
        "description": f"Made by millrace {__version__}. [millrace schedule {mark}]",
        "experiment_id": parent,
        "mode": "DISABLE" if old else "ENABLE",
        "max_concurrency": "1",
        "no_catchup": True,
        **content,
    }

    def find() -> Json | None:
        found = api.pages("/recurringruns", "recurringRuns", experiment_id=parent, filter=filter_(display_name=name))
        return next((each for each in found if f"key={key}" in str(each.get("description"))), None)

    made = _read(api.create("/recurringruns", body, "recurring_run_id", find))
    if made is None:
        why = f"{api.target.host}: has not kept the description of schedule {name}"
        raise KfpError(why, "is this Kubeflow Pipelines 2.15 to 2.17?")
    return made


def set_enabled(api: Api, schedule_id: str, on: bool) -> None:
    """Let a schedule start runs, or not; those it has started go on."""
    api.act("POST", f"/recurringruns/{schedule_id}:{'enable' if on else 'disable'}")


def remove(api: Api, schedule_id: str) -> bool:
    """Delete a disabled schedule; False if it has an active run, with which it stays."""
    if active_runs(api, schedule_id):
        return False
    delete(api, schedule_id)
    return True


def active_runs(api: Api, schedule_id: str) -> list[str]:
    """Ids of the runs that a schedule has started and that have not ended."""
    found = api.pages(
        "/runs",
        "runs",
        experiment_id=experiment(api),
        sort_by="created_at desc",
        filter=filter_(recurring_run_id=schedule_id),
    )
    return [str(run["run_id"]) for run in found if run.get("state") not in FINAL]


def delete(api: Api, schedule_id: str) -> None:
    """Delete a schedule, its runs' objects apart where the server (from 2.16) can tell them apart."""
    try:
        api.act("DELETE", f"/recurringruns/{schedule_id}", propagation_policy="ORPHAN")
    except KfpError as error:
        if error.status != 404:
            raise


def _ordered(found: list[Schedule]) -> list[Schedule]:
    """The older first: by the number of the change, then by time, which the server counts in seconds."""
    return sorted(found, key=lambda each: (each.change, each.created, each.id))


def _read(found: Json) -> Schedule | None:
    """A recurring run as ours; None if it is someone else's."""
    mark = _MARK.search(str(found.get("description") or ""))
    if not mark:
        return None
    trigger: dict[str, Any] = (found.get("trigger") or {}).get("cron_schedule") or {}
    return Schedule(
        id=str(found["recurring_run_id"]), name=str(found.get("display_name")), cron=str(trigger.get("cron") or ""),
        enabled=found.get("status") == "ENABLED", digest=mark["digest"], key=mark["key"], change=int(mark["change"]),
        was_paused=mark["paused"] == "yes", created=str(found.get("created_at") or ""),
    )  # fmt: skip


def _with(schedule: Schedule, *, enabled: bool) -> Schedule:
    return replace(schedule, enabled=enabled)
