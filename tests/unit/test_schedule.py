"""Schedules against a real HTTP server: one name is one schedule, whatever breaks off when, and no active run is ended."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from pipelines import cron, kfp_api, schedule
from pipelines.cli import main
from pipelines.kfp_target import Target
from tests.kfp_server import KfpServer
from trainer.errors import ConfigError

MONDAYS, DAILY = cron.parse("0 3 * * 1"), cron.parse("@daily")
TINY: dict[str, Any] = {
    "components": {"comp-a": {"executorLabel": "exec-a"}}, "deploymentSpec": {}, "pipelineInfo": {"name": "tiny"},
    "root": {"dag": {"tasks": {"a": {"componentRef": {"name": "comp-a"}, "taskInfo": {"name": "a"}}}},
             "inputDefinitions": {"parameters": {"text": {"parameterType": "STRING", "isOptional": True}}}},
    "schemaVersion": "2.1.0", "sdkVersion": "kfp-2.17.0",
}  # fmt: skip
REMOTE = "promote.registry=s3://bucket/registry"


def reconcile(
    server: KfpServer, times: cron.Cron = MONDAYS, text: str = "a", spec: dict[str, Any] = TINY
) -> schedule.Outcome:
    api = kfp_api.Api(Target(server.url))
    return schedule.reconcile(api, "weekly", [spec], times, {"text": text})


def present(server: KfpServer) -> dict[str, Any]:
    """The only schedule on the server."""
    (found,) = server.recurring.values()
    return dict(found)


def changed_spec() -> dict[str, Any]:
    spec = copy.deepcopy(TINY)
    spec["deploymentSpec"]["executors"] = {"exec-a": {"container": {"image": "new"}}}
    return spec


CHANGES: dict[str, Callable[[KfpServer], schedule.Outcome]] = {
    "cron": lambda server: reconcile(server, times=DAILY),
    "arguments": lambda server: reconcile(server, text="b"),
    "pipeline": lambda server: reconcile(server, spec=changed_spec()),
}


def test_three_times_the_same_is_one_schedule(server: KfpServer) -> None:
    assert [reconcile(server).what for _ in range(3)] == ["created", "unchanged", "unchanged"]
    made = present(server)
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert (made["max_concurrency"], made["no_catchup"], made["status"]) == ("1", True, "ENABLED")
    assert len(server.sent("POST", "/recurringruns")) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_replaces_it(server: KfpServer, change: str) -> None:
    before = reconcile(server).schedule
    outcome = CHANGES[change](server)
    assert outcome.what == "replaced"
    assert present(server)["recurring_run_id"] == outcome.schedule.id != before.id
    assert present(server)["status"] == "ENABLED"
    assert CHANGES[change](server).what == "unchanged"


def test_a_paused_schedule_stays_paused_when_it_is_changed(server: KfpServer) -> None:
    reconcile(server)
    schedule.pause(kfp_api.Api(Target(server.url)), "weekly")
    outcome = reconcile(server, text="b")
    assert not outcome.schedule.enabled
    assert present(server)["status"] == "DISABLED"
    assert reconcile(server, text="b").what == "unchanged"
    schedule.resume(kfp_api.Api(Target(server.url)), "weekly")
    assert present(server)["status"] == "ENABLED"


class Crash(BaseException):
    """The process ends here, whatever it catches."""


class CrashingApi(kfp_api.Api):
    """Ends before or after the n-th request that changes something."""

    left = 0
    after = False

    def _send(self, method: str, path: str, query: dict[str, Any], body: Any = None) -> tuple[bytes, str]:
        if method == "GET":
            return super()._send(method, path, query, body)
        self.left -= 1
        if self.left < 0 and not self.after:
            raise Crash
        answer = super()._send(method, path, query, body)
        if self.left < 0:
            raise Crash
        return answer


@pytest.mark.parametrize("again", ["the same", "another", "as before"])
@pytest.mark.parametrize("paused", [False, True], ids=["on", "paused"])
@pytest.mark.parametrize("after", [False, True], ids=["before the effect", "after it"])
@pytest.mark.parametrize("step", range(4))
def test_a_crash_at_any_step_is_repaired_by_the_next_reconcile(
    server: KfpServer, step: int, after: bool, paused: bool, again: str
) -> None:  # fmt: skip
    reconcile(server)
    if paused:
        schedule.pause(kfp_api.Api(Target(server.url)), "weekly")
    api = CrashingApi(Target(server.url))
    api.left, api.after = step, after
    try:
        schedule.reconcile(api, "weekly", [TINY], DAILY, {"text": "b"})
    except Crash:
        # Never is there nothing left to repair from.
        assert server.recurring
    text, times = {"the same": ("b", DAILY), "another": ("c", DAILY), "as before": ("a", MONDAYS)}[again]
    outcome = reconcile(server, text=text, times=times)
    made = present(server)
    assert made["recurring_run_id"] == outcome.schedule.id
    assert made["runtime_config"] == {"parameters": {"text": text}}
    assert made["trigger"]["cron_schedule"]["cron"] == times.text
    assert made["status"] == ("DISABLED" if paused else "ENABLED")
    assert reconcile(server, text=text, times=times).what == "unchanged"


@pytest.mark.parametrize("after", [True, False], ids=["after the effect", "before it"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/recurringruns"),
        ("POST", "/recurringruns/.*:disable"),
        ("POST", "/recurringruns/.*:enable"),
        ("DELETE", ".*"),
    ],
)
def test_a_dropped_connection_at_any_step_is_got_over(server: KfpServer, method: str, path: str, after: bool) -> None:
    reconcile(server)
    server.fail(method, path, after=after)
    assert reconcile(server, text="b").what == "replaced"
    assert present(server)["status"] == "ENABLED"


def test_a_dropped_first_create_makes_one(server: KfpServer) -> None:
    server.fail("POST", "/recurringruns", after=True)
    assert reconcile(server).what == "created"
    assert present(server)["status"] == "ENABLED"


def test_if_the_new_one_cannot_be_enabled_the_old_one_runs_on(server: KfpServer) -> None:
    before = reconcile(server).schedule
    server.fail("POST", "/recurringruns/.*:enable", status=500)
    with pytest.raises(kfp_api.KfpError):
        reconcile(server, text="b")
    assert server.recurring[before.id]["status"] == "ENABLED"
    assert reconcile(server, text="b").what == "replaced"
    assert present(server)["runtime_config"] == {"parameters": {"text": "b"}}


def test_two_who_create_at_once_end_with_one(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real, first = schedule._create, itertools.count()

    def twice(*args: Any) -> schedule.Schedule:
        if next(first) == 0:
            with monkeypatch.context() as inner:
                inner.setattr(server, "note", lambda: None)  # for as long as the two are there
                real(*args)
                return real(*args)
        return real(*args)

    monkeypatch.setattr(schedule, "_create", twice)
    reconcile(server)
    server.most_enabled = 0
    assert present(server)["status"] == "ENABLED"
    assert reconcile(server).what == "unchanged"


def test_an_active_run_is_not_ended_by_a_change(server: KfpServer) -> None:
    old = reconcile(server).schedule
    run_id = server.start_run(old.id)
    outcome = reconcile(server, text="b")
    assert outcome.left == (old.id,)
    assert server.recurring[old.id]["status"] == "DISABLED"
    assert server.recurring[outcome.schedule.id]["status"] == "ENABLED"
    assert reconcile(server, text="b").what == "unchanged"
    assert len(server.recurring) == 2
    server.runs[run_id]["state"] = "SUCCEEDED"
    assert reconcile(server, text="b").left == ()
    assert present(server)["recurring_run_id"] == outcome.schedule.id


def test_a_pause_lasts_while_an_older_version_waits_for_its_run(server: KfpServer) -> None:
    run_id = server.start_run(reconcile(server).schedule.id)
    reconcile(server, text="b")
    api = kfp_api.Api(Target(server.url))
    schedule.pause(api, "weekly")
    assert not reconcile(server, text="b").schedule.enabled
    assert all(each["status"] == "DISABLED" for each in server.recurring.values())
    assert schedule.resume(api, "weekly").enabled
    server.runs[run_id]["state"] = "FAILED"
    assert reconcile(server, text="b").what == "unchanged"
    assert present(server)["status"] == "ENABLED"


def test_rm_waits_for_the_active_run_but_starts_no_more(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = server.start_run(reconcile(server).schedule.id)
    assert main(["schedule", "rm", "weekly"]) == 2
    assert run_id in capsys.readouterr().err
    assert present(server)["status"] == "DISABLED"
    server.runs[run_id]["state"] = "FAILED"
    assert main(["schedule", "rm", "weekly"]) == 0
    assert server.recurring == {}


def test_one_that_others_have_made_is_not_touched(server: KfpServer) -> None:
    reconcile(server)
    made = next(iter(server.recurring.values()))
    made["description"] = "mine"
    with pytest.raises(ConfigError, match="has not made"):
        reconcile(server, text="b")
    assert present(server) == made


def test_a_name_in_large_letters_is_another(server: KfpServer) -> None:
    reconcile(server)
    made = next(iter(server.recurring.values()))
    made |= {"display_name": "WEEKLY", "description": "someone else's"}
    server.most_enabled = 0
    assert reconcile(server).what == "created"
    assert len(server.recurring) == 2


def test_other_names_are_other_schedules(server: KfpServer) -> None:
    reconcile(server)
    api = kfp_api.Api(Target(server.url))
    schedule.reconcile(api, "weekly-2", [TINY], MONDAYS, {})
    schedule.delete_all(api, "weekly")
    assert [each.name for each in schedule.listed(api)] == ["weekly-2"]


@pytest.mark.parametrize("name", ["Weekly", "a b", "-a", "a" * 53, "ä", "a_b", "a.b"])
def test_a_name_that_kubernetes_does_not_take_is_refused_before_anything_is_sent(server: KfpServer, name: str) -> None:
    assert main(["schedule", "--cron", "0 3 * * 1", f"--name={name}", REMOTE]) == 2
    assert server.requests == []


@pytest.mark.parametrize("cron_", ["", "61 3 * * 1", "0 3 * *"])
def test_wrong_times_are_refused_before_anything_is_sent(server: KfpServer, cron_: str) -> None:
    assert main(["schedule", "--cron", cron_, REMOTE]) == 2
    assert server.requests == []


def test_a_registry_that_no_pod_can_see_is_refused(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    for override in ("promote.registry=registry", "promote.registry=/mnt/millrace/registry"):
        assert main(["schedule", "--cron", "0 3 * * 1", override]) == 2
        assert "promote.registry" in capsys.readouterr().err
    assert server.requests == []
    assert (
        main(["schedule", "--cron", "0 3 * * 1", "promote.registry=/mnt/millrace/registry", "cluster.claim=shared"])
        == 0
    )


@pytest.mark.parametrize(("flags", "only_if_new"), [([], True), (["--always"], False)])
def test_a_scheduled_run_trains_only_if_there_is_something_new(
    server: KfpServer, flags: list[str], only_if_new: bool
) -> None:
    assert main(["schedule", "--cron", "0 3 * * 1", *flags, REMOTE, "train.epochs=3"]) == 0
    sent = present(server)["runtime_config"]["parameters"]
    assert sent["only_if_new"] is only_if_new
    assert '"epochs": 3' in sent["params"]
    assert "s3://bucket/registry" in sent["params"]


def test_the_commands_from_ls_to_rm(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "ls"]) == 0
    assert main(["schedule", "--cron", "@daily", "--name", "nightly", REMOTE]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no schedules\nschedule nightly: created\n")
    assert out.count("00:00:00 UTC") == 3
    assert main(["schedule", "--experiment", "millrace", "pause", "--host", server.url, "nightly"]) == 0
    assert main(["schedule", "ls"]) == 0
    assert "paused" in capsys.readouterr().out.splitlines()[-1]
    assert main(["schedule", "resume", "nightly"]) == 0
    assert main(["schedule", "next", "nightly", "--count", "2"]) == 0
    assert capsys.readouterr().out.count("00:00:00 UTC") == 3 + 2
    assert main(["schedule", "rm", "nightly"]) == 0
    assert main(["schedule", "rm", "nightly"]) == 2


@pytest.mark.parametrize(
    "words", [["rn"], ["pause", "wekly"], ["ls", "a", "b"], ["pause", "--cron", "@daily"], ["ls", "train.epochs=3"], []]
)
def test_a_wrong_word_is_answered_with_help(
    server: KfpServer, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    reconcile(server)
    assert main(["schedule", *words]) == 2
    assert "fix: " in capsys.readouterr().err


def test_next_needs_no_server() -> None:
    assert main(["schedule", "next", "--cron", "0 3 * * 1"]) == 0


def test_without_any_schedule_there_is_nothing_to_pause(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "pause"]) == 2
    err = capsys.readouterr().err
    assert "experiment millrace has no schedules" in err
    assert "--cron" in err
