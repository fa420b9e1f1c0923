"""The commands against a real HTTP server: submit, status, logs, cancel, runs, compile."""

from __future__ import annotations

import datetime as dt
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines import client, compiler, kfp_api, runview
from pipelines.cli import main
from pipelines.kfp_target import Target
from tests.kfp_nodes import pod_of
from tests.kfp_server import KfpServer
from trainer.config.load import load

CHAIN = ".exit-handler-1.condition-2"
FIRST = {"configure": "done", "preprocess": "running"}
STAGES = ("tune", "train", "distill", "quantize", "evaluate", "promote", "finish")
DONE = {"configure": "done", "preprocess": "cached"} | dict.fromkeys(STAGES, "done")
NOTHING_NEW = {"configure": "done", "condition-2": "skipped", "finish": "done"}
FAILED = {"configure": "done", "preprocess": "done", "train": "failed", "finish": "done"}


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return compiler.package(load(None))


def start(server: KfpServer, documents: list[dict], script: list[tuple[str, dict[str, str]]], name: str = "one") -> str:
    """A run of the real pipeline."""
    server.script = script or server.script
    return str(client.submit(api(server), documents, {}, name)["run_id"])


def api(server: KfpServer, **target: str) -> kfp_api.Api:
    return kfp_api.Api(Target(server.url, **target))


def test_submit_shows_each_task_and_succeeds(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = [("PENDING", {}), ("RUNNING", FIRST), ("SUCCEEDED", DONE)]
    assert main(["submit", "train.epochs=3"]) == 0
    out, err = capsys.readouterr()
    (run,) = server.runs.values()
    assert out.startswith(f"run {run['run_id']}")
    assert f"{server.url}/#/runs/details/{run['run_id']}" in out
    lines = out.splitlines()
    order = [
        "run: PENDING",
        "run: RUNNING",
        "preprocess: running",
        "preprocess: cached (1.0 s)",
        "train: done (42 s)",
    ]
    assert [line for line in lines if line in order] == order
    assert [line for line in lines if "SUCCEEDED" in line] == [lines[-1]], "said once, at the end"
    assert '"epochs": 3' in run["runtime_config"]["parameters"]["params"]
    assert "Warning" not in err


def test_a_failed_run_is_an_error_that_names_the_task(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = start(server, documents, [("FAILED", FAILED)])
    assert main(["status", run_id, "--watch"]) == 1
    out, err = capsys.readouterr()
    for words in (f"run {run_id}: FAILED", "failed: train\n", f"logs {run_id} train"):
        assert words in err
    assert "evaluate: not reached" in out


def test_nothing_new_is_said(server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]) -> None:
    start(server, documents, [("SUCCEEDED", NOTHING_NEW)])
    assert main(["status", "--watch"]) == 0
    assert "nothing new" in capsys.readouterr().out


def test_timeout_leaves_the_run(server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]) -> None:
    server.script = [("RUNNING", FIRST)]
    assert main(["submit", "--timeout", "0.05s"]) == 1
    assert "goes on" in capsys.readouterr().err
    assert not server.sent("POST", "/runs/.*:terminate")


def test_a_run_that_the_server_cannot_read_any_more_is_not_waited_for(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = start(server, documents, [("RUNNING", FIRST)])
    # All that toApiRun gives of a run whose pipeline it cannot parse.
    body = f'{{"run_id": "{run_id}", "error": {{"code": 13, "message": "missing pipeline source"}}}}'.encode()
    server.fail("GET", f"/runs/{run_id}", status=200, body=body, times=99)
    assert main(["status", run_id, "--watch"]) == 1
    assert "missing pipeline source" in capsys.readouterr().err


def test_no_wait_does_not_ask_for_the_run(server: KfpServer) -> None:
    assert main(["submit", "--no-wait", "--name", "night shift"]) == 0
    assert not server.sent("GET", "/runs/[^/]+")
    assert [run["display_name"] for run in server.runs.values()] == ["night shift"]


def test_ctrl_c_leaves_the_run_and_says_how_to_come_back(server: KfpServer, tmp_path: Path) -> None:
    server.script = [("RUNNING", FIRST)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "submit"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(kfp_api.__file__).parents[1])}, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not server.sent("GET", "/runs/[^/]+") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    (run_id,) = server.runs
    assert process.returncode == 130
    assert f"cancel {run_id}" in err
    assert f"status {run_id}" in err
    assert "Traceback" not in err
    assert not server.sent("POST", "/runs/.*:terminate")


@pytest.mark.parametrize("after", [True, False], ids=["after the effect", "before it"])
@pytest.mark.parametrize("status", [0, 502, 504])
def test_a_broken_submit_starts_one_run(server: KfpServer, documents: list[dict], after: bool, status: int) -> None:
    server.fail("POST", "/runs", status=status, after=after)
    run_id = start(server, documents, [("SUCCEEDED", {})])
    assert list(server.runs) == [run_id]


def test_a_name_with_odd_characters_is_found_again(server: KfpServer, documents: list[dict]) -> None:
    server.fail("POST", "/runs", after=True)
    run_id = start(server, documents, [], '50% + ü & "x"?')
    assert list(server.runs) == [run_id]


def test_a_failed_submit_that_worked_is_taken_up(server: KfpServer, documents: list[dict]) -> None:
    server.fail("POST", "/runs", status=500, after=True)
    assert start(server, documents, []) in server.runs
    assert len(server.runs) == 1


def test_a_failed_submit_is_not_repeated(server: KfpServer, documents: list[dict]) -> None:
    server.fail("POST", "/runs", status=500)
    with pytest.raises(kfp_api.KfpError, match="made to fail"):
        start(server, documents, [])
    assert len(server.sent("POST", "/runs")) == 1


@pytest.mark.parametrize("after", [True, False], ids=["after the effect", "before it"])
def test_the_same_name_twice_is_two_runs(server: KfpServer, documents: list[dict], after: bool) -> None:
    first = start(server, documents, [])
    server.fail("POST", "/runs", after=after)
    assert start(server, documents, []) != first
    assert len(server.runs) == 2


def test_a_task_that_has_not_ended_has_run_since_it_began(server: KfpServer, documents: list[dict]) -> None:
    """The server writes 1970 as the end of what has not ended."""
    run = client.get(api(server), start(server, documents, [("RUNNING", FIRST)]))
    found = {task.name: task for task in runview.tasks(documents[0], run, dt.datetime.now(dt.UTC))}
    assert 3400 < (found["preprocess"].took or 0) < 3700
    assert (found["configure"].took, found["train"].took) == (42.0, None)


def test_an_experiment_made_by_someone_else_meanwhile_is_used(server: KfpServer, documents: list[dict]) -> None:
    server.fail("POST", "/experiments", status=409, after=True)
    start(server, documents, [])
    assert len(server.experiments) == 1


def test_a_long_silence_while_waiting_is_told_once(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = start(server, documents, [("SUCCEEDED", DONE)])
    server.fail("GET", f"/runs/{run_id}", times=2 * kfp_api.ATTEMPTS)
    assert client.wait(api(server), run_id, {}, runview.View())["state"] == "SUCCEEDED"
    assert capsys.readouterr().out.count("trying again") == 1


def test_cancel_ends_it_and_the_wait_ends_red(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = start(server, documents, [("RUNNING", FIRST)])
    server.fail("POST", f"/runs/{run_id}:terminate", after=True)
    assert main(["cancel", run_id]) == 0
    assert main(["status", run_id, "--watch"]) == 1
    assert main(["cancel", run_id]) == 0
    assert "has ended: FAILED" in capsys.readouterr().out


def test_runs_lists_pages_and_the_newest_first(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfp_api, "_PAGE", 2)
    names = [f"run {i}" for i in range(5)]
    for name in names:
        start(server, documents, [], name)
    assert main(["runs", "--limit", "4"]) == 0
    assert [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[1:]] == names[:0:-1]


def test_a_run_is_found_by_beginning_name_or_latest(server: KfpServer, documents: list[dict]) -> None:
    ids = [start(server, documents, [], name) for name in ("a", "50% + ü", "c")]
    for word, expected in ((ids[0][:13], ids[0]), ("50% + ü", ids[1]), ("latest", ids[2]), (ids[1], ids[1])):
        assert client.resolve(api(server), word)["run_id"] == expected


@pytest.mark.parametrize("word", ["", "nope", "../x", "a"])
def test_a_run_that_is_not_unique_or_there_is_an_error(
    server: KfpServer, documents: list[dict], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        start(server, documents, [], "a")
    assert main(["status", word]) == 2
    assert "millrace runs" in capsys.readouterr().err


@pytest.mark.parametrize("ui", [False, True], ids=["API", "UI before it"])
@pytest.mark.parametrize("attempts", [None, 1, 3])
def test_logs_of_a_task_and_its_attempts(
    server: KfpServer, documents: list[dict], attempts: int | None, ui: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server.ui = ui
    run_id = start(server, documents, [("FAILED", FAILED)])
    for i in range(attempts or 1):
        server.logs[pod_of("train", CHAIN, None if attempts is None else i)] = f"loss {i}\n"
    assert main(["logs", run_id]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("loss")] == [f"loss {i}" for i in range(attempts or 1)]
    assert "error_message" not in out


def test_no_log_says_where_it_may_be(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = start(server, documents, [("FAILED", FAILED)])
    assert main(["logs", run_id, "train"]) == 1
    assert f"kubectl -n kubeflow logs -l pipeline/runid={run_id}" in capsys.readouterr().err


def test_logs_follow_prints_each_line_once(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    running = {"configure": "done", "preprocess": "done", "train": "running"}
    run_id = start(server, documents, [("RUNNING", running)] * 3 + [("SUCCEEDED", DONE)])
    pod, count = pod_of("train", CHAIN), iter(range(1, 99))
    server.logs[pod] = ""

    def grow(event: str) -> None:
        if event.endswith("/log"):
            server.logs[pod] += f"step {next(count)}\n"

    server.on_event = grow
    assert main(["logs", run_id, "train", "--follow"]) == 0
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(steps) >= 3
    assert steps == [f"step {i + 1}" for i in range(len(steps))]


def test_a_wrong_task_is_answered_with_the_nearest(
    server: KfpServer, documents: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    start(server, documents, [("FAILED", FAILED)])
    assert main(["logs", "latest", "trian"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_what_the_pods_will_not_find_is_said_with_what_comes_of_it(
    server: KfpServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["submit", "--no-wait", "data.source=rows.csv"]) == 0
    err = capsys.readouterr().err
    assert "no params.yaml here: all parameters have their defaults" in err
    assert "data.source=rows.csv is of this machine" in err
    assert "promote.registry=registry is of this machine" in err
    assert "no champion is compared with or kept" in err
    (tmp_path / "params.yaml").write_text("cluster: {claim: c}\n")
    mount = load(None).cluster.mount
    assert main(["submit", "--no-wait", f"data.source={mount}/rows.csv", "promote.registry=s3://bucket/registry"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", [["compile"], ["submit"], ["runs"], ["schedule", "ls"], ["run", "--engine", "docker"]]
)
def test_without_kfp_each_command_says_what_to_install(
    words: list[str], server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("params.yaml").write_text("{}\n")
    for name in ("kfp", "kfp.kubernetes", "kfp_server_api", "docker"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "pip install 'millrace[kfp]'" in err
    assert "Traceback" not in err
    assert server.requests == []


def test_compile_writes_what_submit_sends(server: KfpServer, documents: list[dict], tmp_path: Path) -> None:
    assert main(["compile", "-o", "p.yaml"]) == 0
    assert (tmp_path / "p.yaml").read_text().startswith("#")
    assert main(["submit", "--no-wait"]) == 0
    (sent,) = server.sent("POST", "/runs")
    assert sent.body["pipeline_spec"]["pipeline_spec"] == documents[0]
    assert sent.body["pipeline_spec"]["platform_spec"] == documents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_in_place(
    server: KfpServer, documents: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    run_id = start(server, documents, [("RUNNING", FIRST), ("RUNNING", FIRST), ("SUCCEEDED", DONE)])
    view = runview.View(screen)
    client.wait(api(server), run_id, documents[0], view)
    view.end()
    frames = screen.getvalue().split("\x1b[?25l")[1:]
    assert all(
        frame.count("\n") == int(after.partition("A")[0].removeprefix("\x1b["))
        for frame, after in itertools.pairwise(frames)
    )
    assert "• preprocess" in frames[0]
    assert "✓ preprocess" in frames[-1]
    assert "run RUNNING" in frames[1]
    assert "run SUCCEEDED" not in frames[-1], "that line is the command's"
    assert screen.getvalue().endswith("\x1b[?25h")


@pytest.mark.parametrize("words", [["submit", "--no-wait"], ["schedule", "--cron", "@daily"]])
def test_data_of_this_machine_is_refused_before_anything_is_sent(
    words: list[str], server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.csv").write_text("text,label\na,b\n", encoding="utf-8")
    assert main([*words, "data.source=rows.csv", "promote.registry=s3://bucket/registry"]) == 2
    assert "data.source: rows.csv is of this machine" in capsys.readouterr().err
    assert server.requests == []


def test_a_compiled_project_runs_as_the_project_when_it_is_started_by_hand(server: KfpServer, tmp_path: Path) -> None:
    assert main(["compile", "-o", "p.yaml", "train.epochs=3"]) == 0
    inputs = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))["root"]["inputDefinitions"]["parameters"]
    assert inputs["preset"]["defaultValue"] == ""
    assert json.loads(inputs["params"]["defaultValue"])["train"] == {"epochs": 3}
