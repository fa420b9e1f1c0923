"""What `millrace run` shows, on a terminal and in a pipe."""

import io
import json
import re
from pathlib import Path

import pytest

from pipelines import screen

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def rows(stream: io.StringIO) -> list[str]:
    """What stands in each redrawn row, without colours."""
    return [ESCAPES.sub("", row) for row in re.split(r"[\r\n]", stream.getvalue()) if ESCAPES.sub("", row).strip()]


def play(board: screen.Board) -> None:
    board.skipped("raw")
    board.skipped("preprocess")
    board.start("train")
    board.line("train", "train 30/120 loss 0.5 " + "and much more of it " * 10)
    board.line("train", "\x1b[31ma line in red\x1b[0m")
    board.tick("train")
    board.done("train")
    board.start("evaluate")
    board.failed("evaluate", 3)
    board.end()


def test_no_row_is_wider_than_the_terminal(terminal: Terminal) -> None:
    play(screen.Board(["raw", "preprocess", "train", "evaluate"], terminal))
    assert rows(terminal)
    assert max(map(len, rows(terminal))) <= 80


def test_progress_of_a_stage_becomes_a_bar(terminal: Terminal) -> None:
    play(screen.Board(["train"], terminal))
    assert any("━━━━────────────" in row and "25%" in row and "loss 0.5" in row for row in rows(terminal))


def test_steps_of_a_trial_do_not_move_the_bar_of_the_search(terminal: Terminal) -> None:
    board = screen.Board(["tune"], terminal)
    board.start("tune")
    board.line("tune", "trial 2/4: val_accuracy=0.7")
    board.line("tune", "step 9/10 loss=0.1")
    assert " 50%" in terminal.getvalue().split("\r")[-1]
    assert "9/10" in terminal.getvalue().split("\r")[-1]


def test_files_that_are_read_move_the_bar(terminal: Terminal) -> None:
    board = screen.Board(["preprocess"], terminal)
    board.start("preprocess")
    board.line("preprocess", "preprocess: read 3/4")
    assert " 75%" in terminal.getvalue().split("\r")[-1]


def test_what_kubernetes_counts_is_no_progress(terminal: Terminal) -> None:
    board = screen.Board(["train"], terminal)
    board.start("train")
    for text in (
        "0/1 nodes are available: 1 Insufficient cpu.",
        "waiting: 0/1 nodes are available: 1 Insufficient cpu.",
    ):
        board.line("train", text)
        assert "0/1 nodes are available" in terminal.getvalue().split("\r")[-1]
        assert "%" not in terminal.getvalue()


def test_the_cursor_comes_back(terminal: Terminal) -> None:
    play(screen.Board(["train"], terminal))
    written = terminal.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_pipe_gets_plain_lines_and_every_line_of_a_stage() -> None:
    stream = io.StringIO()
    play(screen.Board(["raw", "preprocess", "train", "evaluate"], stream))
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert "train: started (3/4)" in lines
    assert "train: a line in red" in lines
    assert any(line.startswith("train: train 30/120 loss 0.5 and much more") for line in lines)
    assert any("2 unchanged" in line and "raw, preprocess" in line for line in lines)
    assert any("✗ evaluate" in line and "exit code 3" in line for line in lines)


def test_no_color_is_respected(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert screen.Paint(terminal)("text", "green") == "text"
    monkeypatch.delenv("NO_COLOR")
    assert screen.Paint(terminal)("text", "green") != "text"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 m 00 s"),
        (125, "2 m 05 s"),
        (3599.4, "59 m 59 s"),
        (3599.6, "1 h 00 m"),
        (7830, "2 h 10 m"),
    ],
)
def test_durations(value: float, text: str) -> None:
    assert screen.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (1_340_000, "1.3 MB"), (5e9, "5.0 GB")],
)
def test_sizes(value: float, text: str) -> None:
    assert screen.size(value) == text


METRICS = {
    "candidate": {"accuracy": 0.91234, "macro_f1": 0.88, "bytes": 1_612_000, "latency_p50_ms": 0.412, "name": "x"},
    "teacher": {"accuracy": 0.92, "macro_f1": 0.89, "bytes": 16_780_000, "latency_p50_ms": 0.9},
    "baseline": {"name": "TF-IDF (words, pairs) + logistic regression", "accuracy": 0.84, "macro_f1": 0.79},
    "comparison": {"p_value": 1.234e-9},
    "gate": {"decision": "promoted", "reason": "r"},
}


def finished(folder: Path, metrics: dict, **promotion: str) -> Path:
    for name, content in (
        ("evaluation/metrics.json", metrics),
        (
            "promotion/promotion.json",
            {"model": "text-classify", "version": "v0002", "registry": "registry", **promotion},
        ),
    ):
        (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "out" / name).write_text(json.dumps(metrics if content is metrics else content), encoding="utf-8")
    return folder


def test_last_screen_says_what_was_made_how_good_it_is_and_what_next(tmp_path: Path) -> None:
    reason = "7.23 points better (p < 0.0001) than the baseline, TF-IDF (words, pairs) + logistic regression; no champion yet"
    finished(tmp_path, METRICS, decision="promoted", champion="v0002", reason=reason)
    lines = screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 200.0, 8)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    for expected in ("0.9123", "0.8400", "1.6 MB", "0.41 ms", "PROMOTED", "v0002", "1.2e-09", "3 m 20 s",
                     "out/quantized", "out/evaluation/report.html", "predict", "report --open", "registry ls"):  # fmt: skip
        assert expected in text
    assert reason in " ".join(text.split())


def test_last_screen_of_a_refusal_names_the_champion_that_stays(tmp_path: Path) -> None:
    finished(tmp_path, METRICS, decision="refused", champion="v0001", reason="1.0 point worse")
    text = "\n".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0))
    assert "REFUSED" in text
    assert "v0001" in text
    assert "nothing has changed" in text


def test_what_to_do_next_follows_the_decision(tmp_path: Path) -> None:
    nexts = {}
    for decision in ("promoted", "refused"):
        finished(tmp_path, METRICS, decision=decision, champion="v0001", reason="r")
        text = "\n".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0))
        nexts[decision] = text.partition("Next\n")[2]
        assert max(map(len, nexts[decision].replace(screen.program(), "millrace").splitlines())) <= 80
    assert "registry promote text-classify v0002" in nexts["refused"]
    assert all(words in nexts["refused"] for words in ("report --open", "run tune.trials=20"))
    assert "predict" not in nexts["refused"], "the refused model is not the one that would answer"
    assert "predict" in nexts["promoted"]
    assert "registry promote" not in nexts["promoted"]


def test_after_a_refusal_without_a_search_one_is_proposed(tmp_path: Path) -> None:
    finished(tmp_path, METRICS, decision="refused", champion="v0001", reason="r")
    (tmp_path / "out" / "tuning").mkdir()
    for params, words in (({}, "run tune.enabled=true tune.trials=20"), ({"train.lr": 0.03}, "run tune.trials=20")):
        (tmp_path / "out" / "tuning" / "best.json").write_text(json.dumps({"params": params}), encoding="utf-8")
        text = "\n".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0))
        assert f" {words} " in text


def dataset(folder: Path, **dropped: int) -> Path:
    meta = {"rows": {"train": 1900, "test": 98}, "num_read": 2004, "spec": {"num_labels": 5}, "dropped": dropped}
    (folder / "dataset").mkdir(exist_ok=True)
    (folder / "dataset" / "manifest.json").write_text(json.dumps({"meta": meta}), encoding="utf-8")
    return folder


def test_rows_that_were_dropped_are_grouped(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    assert screen.stage_summary("preprocess", folder) == "1,998 rows of 2,004, 5 labels"
    dataset(tmp_path, **{"malformed:columns": 2, "malformed:encoding": 4})
    assert screen.stage_summary("preprocess", folder) == "1,998 rows of 2,004 (6 malformed), 5 labels"
    dataset(tmp_path, duplicate=1200, near_duplicate=3, too_long=1, rare_label=1, **{"malformed:columns": 2})
    whole = "1,998 rows of 2,004 (2 malformed, 1,200 duplicates, 3 near duplicates, 2 other), 5 labels"
    assert screen.stage_summary("preprocess", folder) == whole
    narrow = screen.stage_summary("preprocess", folder, room=70)
    assert narrow == "1,998 rows of 2,004 (2 malformed, 1,203 duplicates, 2 other), 5 labels"
    assert screen.stage_summary("preprocess", folder, room=10).startswith("1,998 rows of 2,004 (2 malformed")


def test_a_terminal_shows_what_was_dropped(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    dataset(tmp_path / "out", duplicate=1200, near_duplicate=3)
    board = screen.Board(["preprocess"], terminal)
    board.start("preprocess")
    board.done("preprocess")
    assert "(1,203 duplicates), 5 labels" in rows(terminal)[-1]
    assert max(map(len, rows(terminal))) <= 80


def test_a_pipe_names_the_stage_once() -> None:
    stream = io.StringIO()
    board = screen.Board(["preprocess"], stream)
    board.line("preprocess", "preprocess: reading files=1")
    board.line("preprocess", "preprocessed")
    assert stream.getvalue().splitlines() == ["preprocess: reading files=1", "preprocess: preprocessed"]


def test_last_screen_names_the_present_champion(tmp_path: Path) -> None:
    """promotion.json is of the past: somebody may have promoted another one since."""
    finished(tmp_path, METRICS, decision="promoted", champion="v0002", reason="r")
    text = " ".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0, champion="v0007"))
    assert "champion: v0007" in text
    assert "since this was judged" in text
    text = " ".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0, champion="v0002"))
    assert "since" not in text
    text = " ".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0, champion=""))
    assert "champion: none" in text
    finished(tmp_path, METRICS | {"baseline": {"name": "none"}}, decision="promoted", champion="v0002", reason="r")
    assert "baseline" not in " ".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 0))


def test_last_screen_of_a_language_model_shows_its_own_figures(tmp_path: Path) -> None:
    metrics = {
        "candidate": {"bits_per_byte": 1.5, "perplexity": 9.1, "bytes": 10},
        "baseline": {"name": "5-gram", "bits_per_byte": 2.25},
    }
    finished(tmp_path, metrics, decision="promoted", champion="v0001", reason="r")
    text = "\n".join(screen.last_screen(tmp_path, screen.Paint(io.StringIO()), 2.0, 1))
    assert "bits/byte" in text
    assert "1.5000" in text
    assert "2.2500" in text
    assert "accuracy" not in text


@pytest.mark.parametrize(
    "stage", ["preprocess", "tune", "train", "distill", "quantize", "evaluate", "promote", "raw", "new"]
)
def test_a_summary_never_fails_over_what_is_not_there(stage: str, tmp_path: Path) -> None:
    assert screen.stage_summary(stage, tmp_path) in ("", "no search")
    for name in ("dataset", "tuning", "model", "student", "quantized", "evaluation", "promotion"):
        (tmp_path / name).mkdir()
        for file in ("manifest.json", "best.json", "metrics.json", "promotion.json"):
            (tmp_path / name / file).write_text('{"meta": {"rows": 3}, "record": null}', encoding="utf-8")
    assert isinstance(screen.stage_summary(stage, tmp_path), str)


def test_a_stage_that_never_began_took_no_time() -> None:
    stream = io.StringIO()
    board = screen.Board(["raw", "train"], stream)
    board.failed("train", 1)
    assert stream.getvalue().split() == ["✗", "train", "exit", "code", "1"]
