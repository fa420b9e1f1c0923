"""Lines of a pod's log: each once, over reconnections; and the error that a stage printed."""

from __future__ import annotations

from components.launch.logs import Once, trainer_error


def read(once: Once, *lines: str) -> list[str]:
    once.begin()
    return [text for line in lines if (text := once.line(line)) is not None]


A, B, C = (f"2026-11-21T10:00:00.{part}Z" for part in ("1", "100000002", "2"))


def test_lines_that_come_twice_are_printed_once() -> None:
    once = Once()
    assert read(once, f"{A} one", f"{B} two") == ["one", "two"]
    assert once.since == "2026-11-21T10:00:00Z"
    assert read(once, f"{A} one", f"{B} two", f"{C} three") == ["three"]


def test_lines_of_the_same_time_are_told_apart_by_their_number() -> None:
    once = Once()
    assert read(once, f"{A} same", f"{A} same") == ["same", "same"]
    assert read(once, f"{A} same", f"{A} same", f"{A} same", f"{B} next") == ["same", "next"]


def test_lines_out_of_order_are_kept() -> None:
    """Standard output and standard error are stamped by two writers."""
    once = Once()
    lines = [f"{B} out", f"{A} err", f"{C} out", f"{B} err", "2026-11-21T10:00:01Z next", f"{C} late"]
    assert read(once, *lines) == ["out", "err", "out", "err", "next", "late"]
    assert read(once, lines[4], "2026-11-21T10:00:01.5Z new") == ["new"]


def test_what_is_older_than_asked_for_was_there_before() -> None:
    once = Once()
    read(once, f"{A} one", "2026-11-21T10:00:01Z two")
    assert read(once, f"{A} one", f"{B} rotated", "2026-11-21T10:00:01Z two") == []


def test_further_pieces_of_a_long_line_go_with_their_first() -> None:
    once = Once()
    assert read(once, f"{A} begin", "middle") == ["begin", "middle"]
    assert read(once, f"{A} begin", "middle", f"{B} next") == ["next"]


def test_empty_lines_are_kept() -> None:
    assert read(Once(), A, f"{B} ") == ["", ""]


def test_the_error_of_a_stage_is_found_behind_what_came_after_it() -> None:
    lines = [
        "noise",
        "error: first",
        "  fix: no",
        "error: train.lr: too high",
        "  of two rows",
        "  fix: lower it",
        "bye",
    ]
    told = trainer_error(lines)
    assert told is not None
    assert (told.message, told.hint) == ("train.lr: too high\n  of two rows", "lower it")


def test_the_error_of_a_stage_as_json() -> None:
    told = trainer_error(["{", '{"message": "error", "error": "bad", "fix": "mend", "exit_code": 2}'])
    assert told is not None
    assert (told.message, told.hint) == ("bad", "mend")


def test_no_error_is_none() -> None:
    assert trainer_error(["terror: no", '{"error": 1}', "Traceback"]) is None
