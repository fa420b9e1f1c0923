"""Lines of a stage: for people, for machines, for Katib; and progress without a terminal."""

import json

import pytest

from trainer import log


@pytest.fixture
def as_json():
    log.configure("json")
    yield
    log.configure("text")


def test_text_lines_end_in_name_and_value(capsys):
    log.say("epoch 3", val_accuracy=0.91234567, lr=1e-05, what="x")
    assert capsys.readouterr().out == "epoch 3 val_accuracy=0.912346 lr=1e-05 what=x\n"


def test_lines_without_a_message_are_what_katib_reads(capsys):
    log.say("", val_loss=0.5)
    assert capsys.readouterr().out == "val_loss=0.5\n"


def test_json_lines_are_json_whatever_is_said(capsys, as_json):
    log.say('quote " and\nline', loss=float("nan"), rate=float("inf"), path=object, text="é\u2028", number=3)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["message"] == 'quote " and\nline'
    assert (found["loss"], found["rate"], found["number"]) == ("nan", "inf", 3)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_secrets_are_not_said(capsys, log_format):
    log.configure(log_format)
    log.say("reading s3://key:topsecret@bucket/x", source="https://u:topsecret@h/x")
    log.configure("text")
    assert "topsecret" not in capsys.readouterr().out


def test_progress_without_a_terminal_is_a_line_each_tenth(capsys):
    with log.Progress("read", 1000, pause=0.0) as progress:
        for done in range(1, 1001):
            progress.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "read 1000/1000"
    assert not any("\r" in line or "\033" in line for line in lines)


def test_progress_pauses_between_lines(capsys):
    with log.Progress("read", 1000, pause=60.0) as progress:
        for done in range(1, 1001):
            progress.update(done)
    assert capsys.readouterr().out == ""


def test_progress_of_nothing_says_nothing(capsys):
    with log.Progress("read", 0, pause=0.0) as progress:
        progress.update(0)
    assert capsys.readouterr().out == ""
