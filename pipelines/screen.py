"""What `millrace run` shows: a line per stage, live on a terminal, and a last screen that says what was made."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pipelines.dvcfile import OUT
from trainer.errors import EXIT_CODES, MillraceError
from trainer.storage import is_remote, read_json

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
# A word and a count, as `trainer.log.Progress` writes it. Kubernetes, too, counts: "0/1 nodes are available: ...".
_PROGRESS = re.compile(r"^(?:\w+: )?(?P<what>[a-z][\w -]*?) (?P<done>\d+)/(?P<total>\d+)\b\s*(?P<note>.*)$")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NAMES = 12
# Lines of a failed stage that are shown again below the board.
TAIL = 12
# Reasons for which preprocess drops rows, as they are grouped in its line; in fewer groups where it is narrow.
_KINDS = (
    {"malformed": "malformed", "duplicate": "duplicates", "near_duplicate": "near duplicates"},
    {"malformed": "malformed", "duplicate": "duplicates", "near_duplicate": "duplicates"},
)


def is_live(stream: TextIO) -> bool:
    """Whether the stream is a terminal on which lines can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Paint:
    """Colours on a terminal, none elsewhere or where NO_COLOR is set."""

    def __init__(self, stream: TextIO) -> None:
        self.on = is_live(stream) and not os.environ.get("NO_COLOR")

    def __call__(self, text: str, *styles: str) -> str:
        """The text in these styles."""
        if not self.on or not styles:
            return text
        return f"\x1b[{';'.join(_STYLES[style] for style in styles)}m{text}\x1b[0m"


def ended(paint: Paint, stage: str, code: int) -> str:
    """The line that names the stage that failed, its exit code and what that means."""
    meaning = EXIT_CODES.get(code, f"ended by signal {code - 128}" if code > 128 else "failed")
    return f"\n{paint(f'stage {stage} ended with exit code {code}', 'bold', 'red')}: {meaning}\n"


def seconds(value: float) -> str:
    """A duration for a narrow column: 0.4 s, 12 s, 3 m 05 s, 2 h 10 m."""
    if value < 59.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(int(value + 0.5), 60)
    return f"{minutes} m {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def size(value: float) -> str:
    """A number of bytes: 512 B, 1.3 MB."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


class Board:
    """A line for each stage as it runs."""

    def __init__(self, stages: list[str], stream: TextIO | None = None, out: Path = Path(OUT)) -> None:
        self.stream = stream or sys.stdout
        self.live = is_live(self.stream)
        self.paint = Paint(self.stream)
        self.stages = stages
        self.out = out
        self.unchanged: list[str] = []
        self.ran: list[str] = []
        self._started = 0.0
        self._note = ""
        self._share: float | None = None
        self._frame = 0

    def start(self, stage: str, ago_s: float = 0.0) -> None:
        """A stage begins, or began some seconds ago."""
        self._flush_unchanged()
        self.ran.append(stage)
        self._started, self._note, self._share = time.monotonic() - ago_s, "", None
        if self.live:
            self._draw(stage)
        else:
            self._print(
                f"{stage}: started ({self.stages.index(stage) + 1 if stage in self.stages else '?'}/{len(self.stages)})"
            )

    def line(self, stage: str, text: str) -> None:
        """The running stage printed a line."""
        text = ESCAPES.sub("", text).rstrip()
        if not text:
            return
        if not self.live:
            self._print(text if not stage or text.startswith(f"{stage}: ") else f"{stage}: {text}")
            return
        found = _PROGRESS.match(text)
        if found and int(found["total"]) and found["what"] != "step":  # a step of a trial moves no bar of trials
            self._share = min(int(found["done"]) / int(found["total"]), 1.0)
            text = found["note"].lstrip(": ") or f"{found['done']}/{found['total']}"
        self._note = text
        self._draw(stage)

    def tick(self, stage: str) -> None:
        """Time passed."""
        if self.live and stage:
            self._draw(stage)

    def done(self, stage: str, took_s: float | None = None) -> None:
        """The running stage is complete, since now if its seconds are not given."""
        took = seconds(time.monotonic() - self._started if took_s is None else took_s)
        self._line(self.paint("✓", "green"), stage, took, stage_summary(stage, self.out, room=self._room()))

    def restored(self, stage: str) -> None:
        """DVC had the stage's result of an earlier run with the same inputs."""
        self._flush_unchanged()
        self._line(self.paint("✓", "green"), stage, "cached", stage_summary(stage, self.out, room=self._room()))

    def skipped(self, stage: str) -> None:
        """Nothing changed for this stage."""
        self.unchanged.append(stage)

    def failed(self, stage: str, code: int) -> None:
        """The running stage failed, or one that DVC could not even start."""
        took = seconds(time.monotonic() - self._started) if self.ran[-1:] == [stage] else ""
        self._line(self.paint("✗", "red"), stage, took, f"exit code {code}")

    def end(self) -> None:
        """After the last stage."""
        if self.live:
            self._write("\r\x1b[K\x1b[?25h")
        if self.ran:
            self._flush_unchanged()

    def _flush_unchanged(self) -> None:
        if self.unchanged:
            self._line(self.paint("·", "dim"), f"{len(self.unchanged)} unchanged", "", ", ".join(self.unchanged))
            self.unchanged = []

    def _line(self, mark: str, stage: str, took: str, note: str) -> None:
        if len(note) > self._room():
            note = note[: self._room() - 1] + "…"
        line = f"  {mark} {stage:<{_NAMES}} {took:>8}  {self.paint(note, 'dim')}"
        self._write(f"\r\x1b[K{line.rstrip()}\n" if self.live else f"{line.rstrip()}\n")

    def _room(self) -> int:
        """Characters that fit beside a stage's name and time; in a pipe, all."""
        return max(shutil.get_terminal_size().columns, 40) - _NAMES - 17 if self.live else sys.maxsize

    def _draw(self, stage: str) -> None:
        self._frame += 1
        width = shutil.get_terminal_size().columns - 1
        took = seconds(time.monotonic() - self._started)
        bar = ""
        if self._share is not None:
            filled = round(16 * self._share)
            bar = f"{'━' * filled}{'─' * (16 - filled)} {self._share:4.0%}  "
        room = width - _NAMES - 16 - len(bar)
        note = self._note[: room - 1] + "…" if len(self._note) > room else self._note
        spin = self.paint(SPINNER[self._frame % len(SPINNER)], "cyan")
        self._write(
            f"\r\x1b[K\x1b[?25l  {spin} {self.paint(f'{stage:<{_NAMES}}', 'bold')} {took:>8}  {bar}{self.paint(note, 'dim')}"
        )

    def _print(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def stage_summary(stage: str, out: Path = Path(OUT), room: int = sys.maxsize) -> str:
    """A few words on what a stage made, from its artifact's manifest; fewer where there is `room` for few characters."""
    ports = {"preprocess": "dataset", "tune": "tuning", "train": "model", "distill": "student", "quantize": "quantized",
             "evaluate": "evaluation", "promote": "promotion"}  # fmt: skip
    found = read_json(out / ports[stage] / "manifest.json") if stage in ports else {}
    if not found:
        return ""
    meta, metrics = found.get("meta") or {}, (found.get("record") or {}).get("metrics") or {}
    try:
        if stage == "preprocess":
            return _dataset_summary(meta, room)
        if stage == "tune":
            best = read_json(out / "tuning" / "best.json")
            chosen = " ".join(f"{key}={_short(value)}" for key, value in (best.get("params") or {}).items())
            return f"{best.get('metric')} {_short(best.get('value'))}  {chosen}" if chosen else "no search"
        if stage == "promote":
            verdict = read_json(out / "promotion" / "promotion.json")
            return f"{verdict['decision']}: {verdict['model']} {verdict['version']}" if verdict else ""
        if stage == "evaluate":
            return _evaluation_summary(read_json(out / "evaluation" / "metrics.json"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
    wanted = [
        name for name in ("val_accuracy", "val_bits_per_byte", "accuracy", "num_parameters", "bytes") if name in metrics
    ]
    return "  ".join(_figure(name, metrics[name]) for name in wanted[:3])


def _dataset_summary(meta: Mapping[str, Any], room: int) -> str:
    """Rows, why the others are not there, and labels: with as many words as fit into `room` characters."""
    rows = meta.get("rows") or {}
    text = f"{sum(rows.values()):,} rows of {int(meta.get('num_read', 0)):,}"
    labels = (meta.get("spec") or {}).get("num_labels")
    tail = f", {labels} labels" if labels else ""
    dropped = meta.get("dropped") or {}
    forms = [text + found + end for kinds in _KINDS for found in [_dropped(dropped, kinds)] for end in (tail, "")]
    return next((form for form in forms if len(form) <= room), forms[-1])


def _dropped(dropped: Mapping[str, int], kinds: Mapping[str, str]) -> str:
    counts: Counter[str] = Counter()
    for reason, number in dropped.items():
        counts[kinds.get(reason.partition(":")[0], "other")] += number
    named = [f"{counts[kind]:,} {kind}" for kind in dict.fromkeys([*kinds.values(), "other"]) if counts[kind]]
    return f" ({', '.join(named)})" if named else ""


def _evaluation_summary(metrics: Mapping[str, Any]) -> str:
    score = headline(metrics)
    if not score:
        return ""
    baseline = (metrics.get("baseline") or {}).get(score)
    text = f"{score.replace('_', ' ')} {_short(metrics['candidate'][score])}"
    return f"{text}, baseline {_short(baseline)}" if baseline is not None else text


def _figure(name: str, value: float) -> str:
    if name == "num_parameters":
        return f"{int(value):,} parameters"
    return size(value) if name == "bytes" else f"{name} {_short(value)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def headline(metrics: Mapping[str, Any]) -> str:
    """The metric by which a candidate is judged: the first known one that it has."""
    candidate = metrics.get("candidate") or {}
    return next((name for name in ("accuracy", "bits_per_byte") if isinstance(candidate.get(name), (int, float))), "")


def program() -> str:
    """`millrace` as the person at this terminal can type it."""
    here = Path(sys.executable).with_name("millrace")
    found = shutil.which("millrace")
    if found and Path(found).resolve() == here.resolve():
        return "millrace"
    if not here.exists():
        return f"{Path(sys.executable).name} -m pipelines.cli"
    try:
        return str(here.relative_to(Path.cwd()))
    except ValueError:
        return str(here)


_COLUMNS = (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("bits_per_byte", "bits/byte"), ("perplexity", "perplexity"),
            ("bytes", "size"), ("latency_p50_ms", "latency"))  # fmt: skip


def table(metrics: Mapping[str, Any]) -> list[str]:
    """Candidate, teacher, champion and baseline side by side, a line each."""
    rows = [
        (name, metrics[name])
        for name in ("candidate", "teacher", "champion", "baseline")
        if isinstance(metrics.get(name), dict)
    ]
    columns = [
        (key, title) for key, title in _COLUMNS if any(isinstance(row.get(key), (int, float)) for _, row in rows)
    ][:5]
    lines = [" " * 11 + "".join(f"{title:>11}" for _, title in columns)]
    for name, row in rows:
        if not any(isinstance(row.get(key), (int, float)) for key, _ in columns):
            continue
        cells = "".join(f"{_cell(key, row.get(key)):>11}" for key, _ in columns)
        lines.append(f"{name:<11}{cells}".rstrip())
    return lines


def _cell(key: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    if key == "bytes":
        return size(value)
    return f"{value:.2f} ms" if key.endswith("_ms") else f"{value:.4f}"


def last_screen(
    folder: Path, paint: Paint, took: float, ran: int, *, champion: str | None = None, out: str = OUT, there: str = "",
    run: str = "run",
) -> list[str]:  # fmt: skip
    """What was made, how good it is, the gate's decision and what to do next.

    `champion` is the present one (empty: none); without it, it is the one that the decision left. `out` is the folder,
    inside `folder`, with an entry for each artifact; models that are not on this machine are `there`. `run` is the command.
    """
    made = folder / out
    metrics = read_json(made / "evaluation" / "metrics.json")
    promotion = read_json(made / "promotion" / "promotion.json")
    if not metrics or not promotion:
        raise MillraceError(f"{made}: the run left no evaluation or no decision", "run `millrace run --force`")
    lines = [""]
    lines.append(
        f"  {paint('Done', 'bold', 'green')} in {seconds(took)}."
        if ran
        else f"  {paint('Up to date', 'bold', 'green')}: nothing has changed, no stage was run."
    )
    lines += ["", *(f"  {paint(line, 'dim') if i == 0 else line}" for i, line in enumerate(table(metrics)))]
    baseline = (metrics.get("baseline") or {}).get("name")
    lines += ["", *_wrap(_verdict(metrics), 2)] if baseline and baseline != "none" else []
    decision = promotion.get("decision", "")
    colour = "green" if decision == "promoted" else "yellow"
    left = promotion.get("champion") or ""
    present = left if champion is None else champion
    lines += ["", f"  {paint(decision.upper(), 'bold', colour)}  {promotion.get('model')} {promotion.get('version')}"
              f"  (champion: {present or 'none'}, in {promotion.get('registry')})"]  # fmt: skip
    lines += _wrap(str(promotion.get("reason", "")), 2)
    if present != left:
        changed = f"The champion has changed since this was judged: it was {left or 'none'} then."
        lines += _wrap(f"{changed} `registry ls` tells all; run again to be compared with today's.", 2)
    lines += ["", f"  {paint('Made', 'bold')}"]
    width = max(len(f"{out}/") + 24, len(f"{there}/quantized") if there else 0) + (9 if paint.on else 0)
    for path, what in (("quantized", "the model that is served"), ("model", "its teacher"),
                       ("evaluation/report.html", "the whole run on a page")):  # fmt: skip
        place = there if there and path in ("quantized", "model") else out
        lines.append(f"    {paint(f'{place}/{path}', 'cyan'):<{width}}  {what}")
    task = (read_json(made / "dataset" / "manifest.json").get("meta") or {}).get("task", "classify")
    return [
        *lines,
        "",
        f"  {paint('Next', 'bold')}",
        *_next(made, promotion, str(task), run, not there or is_remote(str(promotion.get("registry")))),
    ]


def _next(out: Path, promotion: Mapping[str, Any], task: str, run: str, at_hand: bool) -> list[str]:
    """Commands that help after this decision; `run` is the one that made it, `at_hand`: this machine reaches the registry."""
    ask = {"classify": '"some text"', "lm": '"def main("'}.get(task, "--file pictures.txt")
    named = f"{promotion.get('model')} {promotion.get('version')}"
    steps = [(f"predict {ask}", ""), ("report --open", ""), ("registry ls", ""), (f"{run} train.epochs=12", "")]
    if promotion.get("decision") != "promoted":
        searched = read_json(out / "tuning" / "best.json").get("params", True)
        steps = [
            ("report --open", "where it errs"),
            (f"{run} tune.trials=20", "a wider search")
            if searched
            else (f"{run} tune.enabled=true tune.trials=20", "a search"),
            (f"registry promote {named}", "take it anyway"),
        ]
    if not at_hand:
        steps = [step for step in steps if not step[0].startswith(("predict", "registry"))]
    name = program()
    return [f"    {name} {words:<36}{f'  # {why}' if why else ''}".rstrip() for words, why in steps]


def _verdict(metrics: Mapping[str, Any]) -> str:
    comparison, name = metrics.get("comparison") or {}, (metrics.get("baseline") or {}).get("name", "")
    p_value = comparison.get("p_value")
    text = f"The baseline is {name}."
    if isinstance(p_value, float):
        text += f" The candidate against it: p = {p_value:.2g} ({comparison.get('test', 'paired test')})."
    return text


def _wrap(text: str, indent: int) -> list[str]:
    import textwrap

    pad = " " * indent
    return textwrap.wrap(text, 78, initial_indent=pad, subsequent_indent=pad)
