"""The last task of a run: what it removes, whom it tells, and that neither fails it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from trainer import finish

SECRET = "canary-4711"


def run(folder: Path, state: str = "SUCCEEDED", **values) -> None:
    status = {"state": state, "pipelineJobResourceName": "x", "error": {}}
    text = json.dumps({
        "inputs": {"parameterValues": {"run_name": "training-x7", "run_id": "run-1", "status": status, **values}},
        "outputs": {"outputFile": f"{folder}/output.json"},
    })  # fmt: skip
    assert finish.run(text) == 0
    assert json.loads((folder / "output.json").read_text()) == {"artifacts": {}}


@pytest.fixture
def told(monkeypatch):
    """What was posted to the address in the environment, and the status to answer with."""
    posted: list = []
    answer = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(answer[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(finish.NOTIFY_URL, f"http://127.0.0.1:{server.server_port}/hooks/{SECRET}")
    yield posted, answer
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("SUCCEEDED", "done"),
        ("COMPLETE", "done"),
        ("FAILED", "failed"),
        ("CANCELLED", "cancelled"),
        ("RUNNING", "over"),
    ],
)
def test_people_are_told_how_it_ended(state, word, told, tmp_path):
    run(tmp_path, state)
    ((path, message),) = told[0]
    assert SECRET in path
    assert word in message["text"]
    assert "training-x7" in message["text"]
    assert (message["state"], message["run_id"]) == (state, "run-1")


def test_a_state_that_says_nothing_is_not_called_a_cancel(told, tmp_path):
    # After "nothing new", and on 2.15 and 2.16 after every run, the chain's state is RUNNING for good.
    run(tmp_path, "RUNNING")
    assert not {"cancelled", "failed", "done"} & set(told[0][0][1]["text"].split())


@pytest.mark.parametrize("status", ["", "{", "[]", "3", None, [], 7, {"state": None}, '{"state": "FAILED"}'])
def test_a_status_of_any_kind_fails_nothing(status, told, tmp_path):
    run(tmp_path, status=status)
    assert told[0][0][1]["state"] == ("FAILED" if "FAILED" in str(status) else "UNKNOWN")


def test_a_store_that_cannot_be_reached_fails_nothing_and_people_are_told(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    run(tmp_path, store=f"s3://user:{SECRET}@bucket/runs")
    assert "done" in told[0][0][1]["text"]
    out = capsys.readouterr()
    assert "not cleaned up" in out.out
    assert SECRET not in out.out + out.err


@pytest.mark.parametrize("status", [404, 500])
def test_an_address_that_refuses_fails_nothing_and_stays_secret(status, told, tmp_path, capsys):
    told[1][0] = status
    run(tmp_path)
    out = capsys.readouterr()
    assert str(status) in out.out
    assert SECRET not in out.out + out.err


@pytest.mark.parametrize(
    "url", [f"http://127.0.0.1:1/{SECRET}", f"ftp://x/{SECRET}", f"http://[{SECRET}", f"file:///{SECRET}"]
)
def test_an_address_that_is_none_fails_nothing_and_stays_secret(url, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(finish.NOTIFY_URL, url)
    run(tmp_path)
    out = capsys.readouterr()
    assert "nobody was told" in out.out
    assert SECRET not in out.out + out.err


def test_without_an_address_nobody_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(finish.NOTIFY_URL, raising=False)
    run(tmp_path)
    assert "nobody" not in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_what_was_not_finished_is_removed_from_the_store(scheme, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.delenv(finish.NOTIFY_URL, raising=False)
    store = f"{scheme}{tmp_path}/store"
    fs = fsspec.filesystem("memory" if scheme else "file")
    root = f"{tmp_path}/store"
    files = {
        "run-1/train/a1/model/manifest.json": True,
        "run-1/train/a1/model/model.safetensors": True,
        "run-1/distill/a2/student/model.safetensors": False,
        "run-1/distill/a2/student/deep/manifest.json": False,
        "run-1/distill/a2/.tmp-student/model.safetensors": False,
        "run-1/preprocess/dataset/manifest.json": True,
        "run-1/preprocess/dataset/train/part-0.parquet": True,
        "run-1/tune/tuning/plots/a.svg": False,
        "run-2/distill/a2/student/model.safetensors": True,
        "registry/m/versions/v0001/model/model.onnx": True,
    }
    for name in files:
        fs.makedirs(f"{root}/{name.rpartition('/')[0]}", exist_ok=True)
        fs.pipe_file(f"{root}/{name}", b"x")
    run(tmp_path, "FAILED", store=store)
    assert {name for name in files if fs.exists(f"{root}/{name}")} == {name for name, kept in files.items() if kept}


@pytest.mark.parametrize("identity", ["", ".", "..", "../other", "/"])
def test_only_a_run_is_cleaned(identity, tmp_path, monkeypatch):
    monkeypatch.delenv(finish.NOTIFY_URL, raising=False)
    deep = tmp_path / "store" / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    run(tmp_path, store=str(tmp_path / "store"), run_id=identity)
    assert (deep / "file").exists()


def test_a_store_without_this_run_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(finish.NOTIFY_URL, raising=False)
    run(tmp_path, store=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
