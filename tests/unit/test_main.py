"""`python -m trainer`: help, exit statuses, errors for people and for machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from trainer.__main__ import main
from trainer.config.load import load
from trainer.config.text import parse_yaml
from trainer.errors import EXIT_CODES
from trainer.stage import STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toy.register(monkeypatch)
    monkeypatch.delenv("TOY", raising=False)


@pytest.fixture
def words(tmp_path):
    source = toy.make(tmp_path / "source")
    return [
        "toy",
        "--in",
        f"source={source}",
        "--out",
        f"made={tmp_path}/out/made",
        "--out",
        f"notes={tmp_path}/out/notes",
    ]


def test_help_lists_stages_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in STAGES:
        assert name in text
    for code, meaning in EXIT_CODES.items():
        assert f"{code}  {meaning}" in text


@pytest.mark.parametrize("name", STAGES)
def test_help_of_each_stage_lists_its_ports_and_sections(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    for word in (*STAGES[name].inputs, *STAGES[name].outputs, *STAGES[name].sections):
        assert word in text


@pytest.mark.parametrize(
    "argv",
    [[], ["trian"], ["toy", "--no-such"], ["toy", "--params"], ["toy", "--log-format", "x"]],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_malformed_override_exits_with_2(capsys):
    assert main(["toy", "train.lr"]) == 2
    assert "section.key=value" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--in", "--out"])
@pytest.mark.parametrize("word", ["source", "source=", "=x", ""])
def test_malformed_ports_are_refused(flag, word, capsys):
    assert main(["toy", flag, word]) == 2
    assert "NAME=URI" in capsys.readouterr().err


def test_a_port_given_twice_is_refused(words, capsys):
    assert main([*words, "--in", "source=other"]) == 2
    assert "--in source is given twice" in capsys.readouterr().err


def test_overrides_may_stand_anywhere(words, tmp_path):
    assert main([words[0], "train.lr=0.5", *words[1:3], "train.epochs=7", *words[3:], "data.text=a=b"]) == 0
    params = json.loads((tmp_path / "out/made/manifest.json").read_text())["record"]["params"]
    assert (params["train"]["lr"], params["train"]["epochs"], params["data"]["text"]) == (0.5, 7, "a=b")


def test_print_config_prints_what_is_read_back(capsys):
    assert main(["toy", "--print-config", "train.lr=0.5"]) == 0
    assert load(None, ["train.lr=0.5"]).model_dump(mode="json") == parse_yaml(capsys.readouterr().out, "printed")


STATUSES = {"write": 0, "fail": 2, "refuse": 4, "bug": 1, "missing": 1}


@pytest.mark.parametrize("todo", STATUSES)
def test_exit_statuses(todo, words, monkeypatch, capsys):
    monkeypatch.setenv("TOY", todo)
    assert main(words) == STATUSES[todo]
    error = capsys.readouterr().err
    assert ("Traceback" in error) == (STATUSES[todo] == 1)
    assert "topsecret" not in error
    if todo != "write":
        assert "error: " in error


def test_a_refusal_may_be_allowed(words, monkeypatch, capsys):
    monkeypatch.setenv("TOY", "refuse")
    assert main([*words, "--allow-refusal"]) == 0
    assert "not better than the champion" in capsys.readouterr().out


def run_json(todo, words):
    return subprocess.run(
        [sys.executable, "-m", "tests.toy", *words, "--log-format", "json"],
        env={**os.environ, "TOY": todo}, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip


def test_json_logs_are_one_object_per_line(words):
    done = run_json("write", words)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"message": "toy at work", "inputs": 1}.items() <= lines[0].items()
    assert isinstance(lines[0]["time"], float)


def test_json_errors_have_message_fix_and_status(words):
    done = run_json("fail", words)
    assert done.returncode == 2
    error = json.loads(done.stderr.splitlines()[-1])
    assert error == {"message": "error", "error": "rows.csv:3: no label", "fix": "correct the row", "exit_code": 2}


def test_json_errors_of_bugs_come_after_the_traceback(words):
    done = run_json("bug", words)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    error = json.loads(done.stderr.splitlines()[-1])
    assert error["exit_code"] == 1
    assert "topsecret" not in done.stderr + done.stdout


def test_a_wrong_uri_with_a_secret_is_shown_without_it(words, capsys):
    assert main([*words[:1], "--in", "source=s3://AKIA:topsecret@bucket/x", *words[3:]]) == 2
    assert main([*words[:1], "--in", "s3://AKIA:topsecret@bucket/x", *words[3:]]) == 2
    assert "topsecret" not in capsys.readouterr().err
