"""The sections of the report, each a function from figures to HTML. Whatever comes from data is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.artifacts.dataset import Dataset
from trainer.evaluate import charts
from trainer.evaluate.charts import esc
from trainer.evaluate.outputs import history
from trainer.evaluate.subjects import Judged

MAX_TEXT = 700
MAX_MATRIX = 40
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def section(title: str, body: str, kind: str = "") -> str:
    """A card; `kind` is its width on a wide screen: half, third, two-thirds, or all of it."""
    return f'<section class="{kind}"><h2>{esc(title)}</h2>{body}</section>' if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], strong: int = -1) -> str:
    """A table of escaped cells; the first column names the row and numbers stand at the right."""
    numeric = [
        index > 0 and all(isinstance(row[index], Number) for row in rows if row[index] != "")
        for index in range(len(head))
    ]
    lines = []
    for number, row in enumerate(rows):
        cells = [f"<th scope=row>{_cell(row[0])}</th>"]
        cells += [f"<td{' class=n' if numeric[i] else ''}>{_cell(row[i])}</td>" for i in range(1, len(head))]
        lines.append(f"<tr{' class=strong' if number == strong else ''}>{''.join(cells)}</tr>")
    heads = "".join(f"<th{' class=n' if numeric[i] else ''}>{esc(name)}</th>" for i, name in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


class Number(str):
    """A number as text; a table puts it at the right."""


class Markup(str):
    """HTML that is safe already."""


def number(value: Any, digits: int = 4) -> Number:
    """A figure with a fixed number of decimals, or a whole number with separators; empty if there is none."""
    if value is None or value == "":
        return Number("")
    return Number(f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}")


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, Markup) else esc(value)


def size(value: float) -> Number:
    """Bytes, for people."""
    if value < 10_000:
        return Number(f"{value:,.0f} B")
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return Number(f"{value / scale:.2f} {unit}")
    return Number(f"{value / 1e3:.0f} kB")


def data(dataset: Dataset) -> str:
    """What was read, dropped and kept, and the splits and labels."""
    meta = dataset.meta
    kept, read = int(meta.get("kept", 0)), int(meta.get("num_read", 0))
    rows: list[tuple[str, float]] = [("read", read)]
    rows += [(f"dropped: {reason.replace('_', ' ')}", int(count)) for reason, count in meta.get("dropped", {}).items()]
    rows.append(("kept", kept))
    parts = [f"<div><h3>From raw data to rows</h3>{charts.bars(rows)}</div>"]
    splits = []
    for split, count in meta.get("rows", {}).items():
        tokens, num_bytes = meta.get("tokens", {}).get(split), meta.get("bytes", {}).get(split)
        splits.append(
            (
                _SPLITS.get(split, split), number(int(count)), number(int(tokens)) if tokens else "",
                size(num_bytes) if num_bytes else "",
            )
        )  # fmt: skip
    columns = [index for index in range(4) if index < 2 or any(row[index] for row in splits)]
    head = ("split", "rows", "tokens", "text")
    parts.append(
        f"<div><h3>Splits</h3>{table([head[i] for i in columns], [[row[i] for i in columns] for row in splits])}</div>"
    )
    counts = sorted(meta.get("label_counts", {}).items(), key=lambda pair: -pair[1])
    if counts:
        shown = charts.bars(counts[:60]).replace('class="bars"', 'class="bars long"')
        more = f'<p class="muted small-text">and {len(counts) - 60:,} labels more</p>' if len(counts) > 60 else ""
        listing = f"<h3>{len(counts)} labels, rows of each</h3>{shown}{more}"
    else:
        listing = ""
    intro = (
        f'<p class="muted">Source <code>{esc(meta.get("source", "unknown"))}</code>, data version '
        f"<code>{esc(meta.get('data_version', 'unknown'))}</code></p>"
    )
    return section("Data", f'{intro}<div class="columns">{"".join(parts)}</div>{listing}')


def learning(inputs: Mapping[str, Path], metric: str) -> str:
    """Loss and validation score of teacher and student over their steps."""
    losses: dict[str, list[tuple[float, float]]] = {}
    scores: dict[str, list[tuple[float, float]]] = {}
    for name, port in (("teacher", "model"), ("student", "student")):
        rows = history(inputs[port])
        for key, title, where in (
            ("train_loss", f"{name}, train", losses),
            ("val_loss", f"{name}, validation", losses),
            (f"val_{metric}", name, scores),
        ):
            points = [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
            if points:
                where[title] = points
    if not losses and not scores:
        return ""
    note = (
        '<p class="muted small-text">The student is trained on the teacher\'s distribution and the labels together: '
        "its train loss has another scale than its validation loss.</p>"
        if "student, train" in losses
        else ""
    )
    title = metric.replace("_", " ")
    body = (
        f"<div><h3>Loss</h3>{charts.lines(losses, 'step', 'loss by step')}</div>"
        f"<div><h3>Validation {esc(title)}</h3>{charts.lines(scores, 'step', f'validation {title} by step')}</div>"
    )
    return section("Learning curves", f'<div class="columns">{body}</div>{note}')


def search(inputs: Mapping[str, Path]) -> str:
    """The search for hyper-parameters, as the tune stage drew it."""
    path = inputs["tuning"] / "search.json" if "tuning" in inputs else None
    if path is None or not path.is_file():
        return ""
    from trainer.tune import plots

    found = json.loads(path.read_text(encoding="utf-8"))
    if not found["trials"]:
        return section("Search", '<p class="muted">The search is switched off (<code>tune.enabled: false</code>).</p>')
    best = found["best"]
    chosen = ", ".join(
        f"{esc(key)} = {esc(f'{value:.4g}' if isinstance(value, float) else value)}"
        for key, value in best["params"].items()
    )
    states = [trial["state"] for trial in found["trials"]]
    counts = ", ".join(f"{states.count(state)} {esc(state)}" for state in dict.fromkeys(states))
    intro = (
        f"<p>{counts}; best {esc(found['metric'])} {best['value']:.4f} with <code>{chosen}</code> "
        f'<span class="muted">({esc(found["sampler"])} sampler, {esc(found["pruner"])} pruner)</span></p>'
    )
    pictures = (
        f"<div><h3>{name}</h3>{draw(found)}</div>"
        for name, draw in (
            ("History", plots.history),
            ("Importance", plots.importance),
            ("Parallel coordinates", plots.parallel),
        )
    )
    return section("Search", f'{intro}<div class="columns">{"".join(pictures)}</div>')


def compression(folder: Path) -> str:
    """The table of the quantize stage."""
    path = folder / "table.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[tuple[Any, ...]] = []
    strong = -1
    for index, row in enumerate(found["rows"]):
        name = Markup(esc(row["variant"]) + ('<span class="tag">served</span>' if row["served"] else ""))
        strong = index if row["served"] else strong
        rows.append(
            (
                name, size(row["bytes"]), Number(f"{row['ratio']:.3f}"), number(row["latency_p50_ms"], 3),
                number(row["latency_p99_ms"], 3), Number(f"{row['rows_per_s']:,.0f}"), number(row["score"]),
                Number(f"{row['lost']:+.2f}"), row["note"],
            )
        )  # fmt: skip
    unit = "points" if "accuracy" in found["metric"] else "%"
    head = ["variant", "size", "of fp32", "p50 ms", "p99 ms", "rows/s", found["metric"], f"lost, {unit}", "note"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    note = (
        f'<p class="muted small-text">Latency of one example, throughput in batches of {found["throughput_batch"]}, both on '
        f"{found['threads']} thread; scores are of the validation split, each measured right after its step.</p>"
    )
    return section("Compression", table(head, rows, strong) + note)


def models(judged: Judged) -> str:
    """All models and baselines on the test split, side by side."""
    order = ("candidate", "student", "teacher", "baseline", "xz", "most_frequent")
    notes = {
        "candidate": "served, int8 where it is quantised",
        "student": "distilled, fp32",
        "teacher": "trained, fp32",
    }
    language = judged.metric == "bits_per_byte"
    rows = []
    for name in order:
        figures = judged.figures.get(name)
        if not figures:
            continue
        note = figures.get("name", notes.get(name, ""))
        title = {"xz": "compressor", "most_frequent": "floor"}.get(name, name)
        first = Markup(f'{esc(title)}<br><span class="muted small-text">{esc(note)}</span>')
        scores = (
            (number(figures["bits_per_byte"]), number(figures.get("perplexity"), 2))
            if language
            else (number(figures["accuracy"]), number(figures["macro_f1"]), number(figures["ece"]))
        )
        rows.append(
            (
                first, *scores, number(figures.get("num_parameters")),
                size(figures["bytes"]) if "bytes" in figures else Number(""), number(figures.get("latency_p50_ms"), 3),
                number(figures.get("latency_p99_ms"), 3),
                Number(f"{figures['throughput_per_s']:,.0f}" if "throughput_per_s" in figures else ""),
            )
        )  # fmt: skip
    scores_head = ("bits per byte", "perplexity") if language else ("accuracy", "macro-F1", "ECE")
    head = ("model", *scores_head, "parameters", "size", "p50 ms", "p99 ms", "per s")
    note = (
        '<p class="muted small-text">Latency from text or pixels to scores at batch size 1, throughput at batch size 64, '
        "on one CPU thread.</p>"
    )
    return section("On the test split", table(head, rows, 0) + note)


_PAIRS = {
    "baseline": "candidate − baseline",
    "student": "candidate − student (what int8 costs)",
    "student_teacher": "student − teacher (what distilling costs)",
    "teacher": "candidate − teacher",
    "champion": "candidate − champion, on its test set",
}


def comparisons(judged: Judged, champion: Mapping[str, Any] | None) -> str:
    """Differences with intervals and p-values."""
    pairs = dict(judged.comparisons)
    if champion and "p_value" in champion:
        pairs["champion"] = dict(champion)
    if not pairs:
        return ""
    language = judged.metric == "bits_per_byte"
    scale = 1.0 if language else 100.0
    unit = "bits per byte (below zero: better)" if language else "points of accuracy"
    drawn, rows = [], []
    for name, title in _PAIRS.items():
        if name not in pairs:
            continue
        found = pairs[name]
        keys = ("bits_per_byte",) if language else ("accuracy", "macro_f1")
        drawn.append((title, found[judged.metric]))
        cells = [_with_interval(found[key], scale, 3 if language else 2) for key in keys]
        p_value = "< 0.0001" if found["p_value"] < 1e-4 else f"{found['p_value']:.4f}"
        rows.append((title, *cells, Number(p_value)))
    level = f"{next(iter(pairs.values()))['confidence']:.0%}"
    heads = ("bits per byte",) if language else ("accuracy, points", "macro-F1, points")
    note = (
        f'<p class="muted small-text">Each with its {level} interval by paired bootstrap; p is two-sided, by '
        f"{esc(next(iter(pairs.values()))['test'])}.</p>"
    )
    body = (
        f"<div><h3>Difference in {esc(unit)}</h3>{charts.differences(drawn, unit, scale)}</div>"
        f"<div>{table(('comparison', *heads, 'p'), rows)}{note}</div>"
    )
    return section("Is it more than chance?", f'<div class="columns">{body}</div>')


def _with_interval(found: Mapping[str, float], scale: float, digits: int) -> Number:
    value, low, high = (scale * found[key] for key in ("value", "low", "high"))
    return Number(f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")


def calibration(judged: Judged) -> str:
    """Confidence against accuracy."""
    if "calibration" not in judged.details:
        return ""
    error = judged.figures["candidate"]["ece"]
    note = (
        f'<p class="muted small-text">Expected calibration error {error:.4f}. On the dashed line, a confidence of 80 % is right '
        "80 % of the time; a bar is darker the more rows it holds.</p>"
    )
    return section("Calibration", charts.calibration(judged.details["calibration"]) + note, "third")


def per_class(judged: Judged, dataset: Dataset) -> str:
    """Precision, recall and F1 of each label, the worst first."""
    if "per_class" not in judged.details:
        return ""
    found = judged.details["per_class"]
    order = [index for index in np.argsort(found["f1"], kind="stable") if found["support"][index]]
    rows = [
        (
            dataset.labels[i], number(float(found["f1"][i]), 3), number(float(found["precision"][i]), 3),
            number(float(found["recall"][i]), 3), number(int(found["support"][i])),
        )
        for i in order
    ]  # fmt: skip
    head = ("label, worst first", "F1", "precision", "recall", "rows")
    body = table(head, rows[:12])
    if len(rows) > 12:
        body += f"<details><summary>All {len(rows):,} labels</summary>{table(head, rows[:500])}</details>"
    return section("Each label", body, "two-thirds")


def mistakes(judged: Judged, dataset: Dataset) -> str:
    """The pairs of labels that are confused most often."""
    if "confusion" not in judged.details:
        return ""
    wrong = judged.details["confusion"].copy()
    totals = np.maximum(wrong.sum(axis=1), 1)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:14]
    rows = []
    for place in order:
        i, j = divmod(int(place), len(wrong))
        if wrong[i, j]:
            share = Number(f"{wrong[i, j] / totals[i]:.0%}")
            rows.append((dataset.labels[i], dataset.labels[j], number(int(wrong[i, j])), share))
    if not rows:
        return section("Most frequent mistakes", '<p class="good-text">Not one row was wrong.</p>', "third")
    return section("Most frequent mistakes", table(("actual", "taken for", "rows", "of them"), rows), "third")


def confusion(judged: Judged, dataset: Dataset) -> str:
    """The confusion matrix; with very many labels, of those with the most mistakes."""
    if "confusion" not in judged.details:
        return ""
    matrix, names, note = judged.details["confusion"], dataset.labels, ""
    if len(names) > MAX_MATRIX:
        errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
        chosen = np.sort(np.argsort(-errors, kind="stable")[:MAX_MATRIX])
        matrix, names = matrix[np.ix_(chosen, chosen)], [names[i] for i in chosen]
        note = f" Of {len(dataset.labels):,} labels, the {MAX_MATRIX} with the most mistakes."
    intro = (
        '<p class="muted small-text">Rows are the actual labels, columns what the candidate said; a cell is stronger the '
        f'larger its share of the row.{note}<span class="narrow-only"> Scroll it sideways.</span></p>'
    )
    return section("Confusion matrix", intro + charts.confusion(matrix, names), "two-thirds")


def examples(judged: Judged, dataset: Dataset, count: int, seed: int) -> str:
    """Right and wrong answers: the wrong ones are those the model was surest of, the right ones are drawn at random."""
    if "actual" not in judged.rows or not count:
        return ""
    rows, split = judged.rows, dataset.split("test")
    right = np.asarray(rows["actual"], object) == np.asarray(rows["predicted"], object)
    score = np.asarray(rows["score"])
    wrong = np.nonzero(~right)[0]
    wrong = wrong[np.argsort(-score[wrong], kind="stable")][:count]
    good = np.random.default_rng(seed).permutation(np.nonzero(right)[0])[:count]
    image = dataset.spec.task == "image"
    texts = [] if image else split.texts()

    def item(index: int, kind: str) -> str:
        said = f"<b>{esc(rows['predicted'][index])}</b> <span class=muted>at {score[index]:.0%}</span>"
        actual = "" if kind == "good" else f", is <b>{esc(rows['actual'][index])}</b>"
        if image:
            shown = charts.picture(np.asarray(split.images[index]), str(rows["actual"][index]))
        else:
            text = texts[index]
            shown = f"<pre>{esc(text[:MAX_TEXT])}{'…' if len(text) > MAX_TEXT else ''}</pre>"
        return f'<li class="{kind}"><p>said {said}{actual}</p>{shown}</li>'

    grid = 'class="examples pictures"' if image else 'class="examples"'
    parts = []
    for title, kind, chosen in (
        ("Wrong, the surest first", "bad", wrong),
        ("Right, drawn at random", "good", good),
    ):
        if len(chosen):
            parts.append(f"<h3>{title}</h3><ul {grid}>{''.join(item(int(index), kind) for index in chosen)}</ul>")
    return section("Examples", "".join(parts))


def code(judged: Judged, count: int) -> str:
    """Lines of code that the model completed."""
    found = judged.code
    if not found:
        return ""
    intro = (
        f"<p>{found['valid']:.0%} of {found['lines']} next lines, completed greedily after real code, are valid Python; "
        f"{found['exact']:.0%} are the very line that stood there.</p>"
    )
    items = []
    for example in found["examples"][: 2 * count]:
        kind = "good" if example["valid"] else "bad"
        words = "valid" if example["valid"] else "does not parse"
        items.append(
            f'<li class="{kind}"><p><span class="{kind}-text">{words}</span></p>'
            f"<pre>{esc(example['before'][-400:])}<b>{esc(example['completed'][:200])}</b></pre>"
            f'<p class="muted">was: <code>{esc(example["actual"][:200])}</code></p></li>'
        )
    return section("Completed lines of code", f'{intro}<ul class="examples">{"".join(items)}</ul>')
