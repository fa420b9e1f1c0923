"""What the launcher makes of its ranks' ends: every combination that torchrun flattens to 1."""

from __future__ import annotations

import json
import signal

import pytest

from trainer.errors import ConfigError, DivergedError, Preempted
from trainer.parallel import launch


@pytest.fixture
def place(tmp_path):
    (tmp_path / launch.ERRORS).mkdir()
    return tmp_path


def failures(place, **codes) -> None:
    (place / launch.FAILURES).write_text(json.dumps({rank.removeprefix("r"): code for rank, code in codes.items()}))


def test_an_error_of_ours_comes_back_with_class_words_and_code(place):
    for error, code in ((ConfigError("a", "b"), 2), (DivergedError("c", "d"), 3), (Preempted("e", "f"), 143)):
        assert launch.write_error(place, 0, error) == code
        found = launch.explain(place, 1, False)
        assert (type(found), found.message, found.hint, found.exit_code) == (
            type(error),
            error.message,
            error.hint,
            code,
        )


def test_a_permanent_error_outweighs_another_ranks_preemption(place):
    launch.write_error(place, 0, Preempted("later", ""))
    launch.write_error(place, 1, DivergedError("now", ""))
    assert launch.explain(place, 1, True).exit_code == 3


def test_a_killed_rank_outweighs_the_failed_collectives_of_the_others(place):
    launch.write_error(place, 0, RuntimeError("Connection closed by peer"))
    failures(place, r0=1, r1=-signal.SIGKILL, r2=-signal.SIGTERM)
    found = launch.explain(place, 1, False)
    assert (found.exit_code, "rank 1" in found.message, "SIGKILL" in found.message) == (137, True, True)


def test_a_bug_shows_its_traceback_once_and_exits_with_1(place, capsys):
    for rank in (0, 1):
        launch.write_error(place, rank, RuntimeError(f"bug of {rank}"))
    assert launch.explain(place, 1, False).exit_code == 1
    shown = capsys.readouterr().err
    assert "bug of 0" in shown
    assert "bug of 1" not in shown


def test_sigterm_before_anything_was_written_is_a_preemption(place):
    assert launch.explain(place, 143, True).exit_code == 143


def test_an_agent_that_was_killed_keeps_its_signal(place):
    assert launch.explain(place, -9, False).exit_code == 137


def test_half_written_notes_are_no_notes(place):
    (place / launch.ERRORS / "rank-0000.json").write_text('{"kind": "Conf')
    (place / launch.FAILURES).write_text("{")
    assert launch.explain(place, 1, False).exit_code == 1
