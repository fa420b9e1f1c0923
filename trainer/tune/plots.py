"""Three pictures of a search as inline SVG: history, importance, parallel coordinates; and a page that shows them.

The figures are drawn 440 units wide for text of 12 units, so that they read on a phone; colours come from custom
properties that `STYLE` sets for light and dark. The report embeds the same three functions.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 36

STYLE = """
.search-plot{--sp-ink:#1d2433;--sp-muted:#5b6474;--sp-line:#dfe3ea;--sp-accent:#2563a8;--sp-best:#b45309;
 --sp-bad:#b3261e;display:block;width:100%;height:auto;max-width:600px;font:12px system-ui,sans-serif}
.search-plot text{fill:var(--sp-ink)} .search-plot .muted{fill:var(--sp-muted)}
.search-plot .axis{stroke:var(--sp-line);fill:none} .search-plot .dot{fill:var(--sp-accent)}
.search-plot .line{stroke:var(--sp-accent);fill:none;stroke-width:1.5}
.search-plot .best{stroke:var(--sp-best);fill:none;stroke-width:2.5} .search-plot .best-dot{fill:var(--sp-best)}
.search-plot .bad{stroke:var(--sp-bad);stroke-width:2;fill:none} .search-plot .bar{fill:var(--sp-accent)}
.search-plot .pruned{stroke:var(--sp-muted);fill:none;stroke-width:1.5}
@media (prefers-color-scheme:dark){.search-plot{--sp-ink:#e6e9ef;--sp-muted:#a0a9b8;--sp-line:#363e4c;
 --sp-accent:#7ab2f2;--sp-best:#f0a44b;--sp-bad:#f2847c}}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
:root{{color-scheme:light dark}}
body{{margin:0 auto;padding:20px 16px 48px;max-width:1320px;font:16px/1.5 system-ui,sans-serif;color:#1d2433;background:#fff}}
h1{{font-size:1.5rem;margin:0 0 .25rem}} h2{{font-size:1.05rem;margin:0 0 .5rem}} p{{margin:.25rem 0 1rem}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:28px 40px;margin:24px 0}}
.table{{overflow-x:auto}} table{{border-collapse:collapse;font-size:.9rem}}
th,td{{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid #dfe3ea;vertical-align:top}}
th{{font-weight:600;white-space:nowrap}} td.number{{text-align:right;font-variant-numeric:tabular-nums}}
@media (max-width:480px){{table{{font-size:.78rem}} th,td{{padding-right:9px}}}}
tr.best td{{font-weight:600}} .muted{{color:#5b6474}}
@media (prefers-color-scheme:dark){{body{{color:#e6e9ef;background:#14181f}} th,td{{border-color:#363e4c}}
 .muted{{color:#a0a9b8}}}}
{style}</style></head><body>
<h1>{title}</h1><p class="muted">{summary}</p>
<div class="plots"><section><h2>History</h2>{history}</section>
<section><h2>Importance of each dimension</h2>{importance}</section>
<section><h2>Parallel coordinates</h2>{parallel}</section></div>
<h2>Trials</h2><div class="table">{table}</div>
</body></html>
"""


def history(data: dict[str, Any]) -> str:
    """Value of each trial and the best so far; a pruned trial is a ring, a failed one a cross on the axis.

    Args:
        data: the content of search.json.
    """
    trials = data["trials"]
    values = [trial["value"] for trial in trials if trial["value"] is not None]
    if not values:
        return _nothing("no trial has a score")
    low, high = _range(values)
    last = max(len(trials) - 1, 1)

    def x(number: int) -> float:
        return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * number / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    parts = [_axis_y(low, high, y)]
    best: float | None = None
    steps: list[str] = []
    for trial in trials:
        value, px = trial["value"], x(trial["number"])
        if value is None:
            place = HEIGHT - BOTTOM
            mark = (
                f'<circle class="pruned" cx="{px:.1f}" cy="{place}" r="4"/>'
                if trial["state"] == "pruned"
                else f'<path class="bad" d="M{px - 4:.1f} {place - 4}l8 8m0-8l-8 8"/>'
            )
            parts.append(f"<g>{mark}{_title(trial)}</g>")
            continue
        better = best is None or (value > best if data["direction"] == "maximize" else value < best)
        if better:
            steps.append(f"M{px:.1f} {y(value):.1f}" if best is None else f"H{px:.1f}V{y(value):.1f}")
            best = value
        kind = "best-dot" if better else "dot"
        parts.append(f'<circle class="{kind}" cx="{px:.1f}" cy="{y(value):.1f}" r="4">{_title(trial)}</circle>')
    parts.insert(1, f'<path class="best" d="{"".join(steps)}H{x(last):.1f}"/>')
    for number in sorted({0, len(trials) // 2, len(trials) - 1}):
        parts.append(_text(x(number), HEIGHT - 14, str(number + 1), "middle", "muted"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 1, "trial", "end", "muted"))
    return _svg(f"{data['metric']} of each trial, and the best so far", parts)


def importance(data: dict[str, Any]) -> str:
    """A bar for each dimension: its share in the variance of the score (fANOVA)."""
    shares = sorted(data["importance"].items(), key=lambda pair: -pair[1])
    if not shares:
        return _nothing("needs four complete trials with different scores")
    row = 38
    top = max(share for _, share in shares) or 1.0
    parts = []
    for index, (key, share) in enumerate(shares):
        base = TOP + row * index
        length = (WIDTH - 64) * share / top
        parts.append(_text(2, base + 10, key))
        parts.append(f'<rect class="bar" x="2" y="{base + 16}" width="{max(length, 1):.1f}" height="12" rx="2"/>')
        parts.append(_text(length + 8, base + 26, f"{share:.0%}", "start", "muted"))
    return _svg("share of each dimension in the variance of the score", parts, TOP + row * len(shares) + 4)


def parallel(data: dict[str, Any]) -> str:
    """A line for each complete trial through its values and its score; the best is drawn over the others."""
    trials = [trial for trial in data["trials"] if trial["value"] is not None]
    if not trials or not data["space"]:
        return _nothing("no trial has a score")
    axes = [_axis(key, dimension, trials) for key, dimension in data["space"].items()]
    low, high = _range([trial["value"] for trial in trials])
    axes.append((data["metric"], lambda trial: (trial["value"] - low) / (high - low), _short(low), _short(high)))
    staggered = len(axes) > 3
    top = TOP + (34 if staggered else 20)
    bottom = HEIGHT - 24
    left, right = 34, WIDTH - 34
    places = [left + (right - left) * index / (len(axes) - 1) for index in range(len(axes))]
    parts = []
    for index, (place, (name, _, least, most)) in enumerate(zip(places, axes, strict=True)):
        anchor = "start" if index == 0 else "end" if index == len(axes) - 1 else "middle"
        edge = 2 if index == 0 else WIDTH - 2 if index == len(axes) - 1 else place
        parts.append(f'<path class="axis" d="M{place:.1f} {top}V{bottom}"/>')
        parts.append(_text(edge, TOP + (16 if staggered and index % 2 else 0), _trim(name, len(axes)), anchor))
        parts.append(_text(edge, bottom + 18, _trim(least, len(axes)), anchor, "muted"))
        parts.append(_text(edge, top - 4, _trim(most, len(axes)), anchor, "muted"))
    sign = 1 if data["direction"] == "maximize" else -1
    best = max(trials, key=lambda trial: (sign * trial["value"], -trial["number"]))
    for trial in [*(trial for trial in trials if trial is not best), best]:
        points = " ".join(
            f"{place:.1f},{bottom - (bottom - top) * min(max(share(trial), 0.0), 1.0):.1f}"
            for place, (_, share, _, _) in zip(places, axes, strict=True)
        )
        goodness = axes[-1][1](trial) if sign > 0 else 1 - axes[-1][1](trial)
        kind = 'class="best"' if trial is best else f'class="line" opacity="{0.25 + 0.6 * goodness:.2f}"'
        parts.append(f'<polyline {kind} points="{points}">{_title(trial)}</polyline>')
    return _svg("values and score of each complete trial", parts)


def page(data: dict[str, Any]) -> str:
    """search.html: the three pictures and a table of all trials, self-contained."""
    states = [trial["state"] for trial in data["trials"]]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed") if state in states
    )
    best = data["best"]
    summary = f"{data['sampler']} sampler, {data['pruner']} pruner, seed {data['seed']}: {counts or 'no trials'}."
    if best["params"]:
        chosen = ", ".join(f"{key} = {_short(value)}" for key, value in best["params"].items())
        summary += f" Best: {data['metric']} {best['value']:.4f} with {chosen}."
    elif not states:
        summary = "The search is switched off (tune.enabled: false): train takes the parameters as they are."
    return _PAGE.format(
        title="Search for hyper-parameters",
        style=STYLE,
        summary=html.escape(summary),
        history=history(data),
        importance=importance(data),
        parallel=parallel(data),
        table=_table(data),
    )


def _table(data: dict[str, Any]) -> str:
    keys = list(data["space"])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", data["metric"], *keys, "seconds", "state"))
    rows = []
    for trial in data["trials"]:
        value = f"{trial['value']:.4f}" if trial["value"] is not None else "–"
        cells = [str(trial["number"] + 1), value, *(_short(trial["params"].get(key, "")) for key in keys)]
        cells.append(f"{trial['seconds']:.1f}")
        state = trial["state"] + (f": {trial['reason']}" if trial["reason"] else "")
        kind = ' class="best"' if trial["number"] == data["best"]["trial"] else ""
        numbers = "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr{kind}>{numbers}<td>{html.escape(state)}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _axis(key: str, dimension: dict[str, Any], trials: Sequence[dict[str, Any]]) -> Any:
    """(name, share of the axis of a trial, label of the low end, label of the high end)."""
    name = key.rsplit(".", 1)[-1]
    if dimension["type"] == "categorical":
        choices = list(dimension["choices"])
        last = max(len(choices) - 1, 1)
        return name, lambda trial: choices.index(trial["params"][key]) / last, _short(choices[0]), _short(choices[-1])
    scale = math.log if dimension["log"] else float
    low, high = scale(dimension["low"]), scale(dimension["high"])
    return (
        name,
        lambda trial: (scale(trial["params"][key]) - low) / (high - low),
        _short(dimension["low"]),
        _short(dimension["high"]),
    )


def _axis_y(low: float, high: float, y: Any) -> str:
    marks = [low, (low + high) / 2, high]
    digits = max(0, min(6, 1 - math.floor(math.log10(high - low)))) if high > low else 3
    parts = []
    for mark in marks:
        parts.append(f'<path class="axis" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(mark) + 4, f"{mark:.{digits}f}", "end", "muted"))
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _trim(text: str, count: int) -> str:
    """Cut a label so that every second one of `count` fits beside its neighbours."""
    room = max(5, int(2 * 62 / max(count, 2)))
    return text if len(text) <= room else text[: room - 1] + "…"


def _title(trial: dict[str, Any]) -> str:
    score = f"{trial['value']:.4f}" if trial["value"] is not None else f"{trial['state']} {trial['reason']}"
    values = ", ".join(f"{key} {_short(value)}" for key, value in trial["params"].items())
    title = f"trial {trial['number'] + 1}: {score} ({values})"
    return f"<title>{html.escape(title)}</title>"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'


def _nothing(reason: str) -> str:
    return _svg(reason, [_text(2, 20, f"Nothing to show: {reason}.", "start", "muted")], 30)


def _svg(label: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg class="search-plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label)}"'
        f' xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
