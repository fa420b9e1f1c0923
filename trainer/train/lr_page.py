"""The page of an LR range test: one picture, the suggestion, and a table. Self-contained, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable

from trainer.evaluate.charts import ticks
from trainer.train.lr_find import Found

WIDTH, HEIGHT = 440, 274
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 44, 40
# Width of the longest name of a suggestion.
NAME = 80
# Rows of the tables.
ROWS = 12

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Learning rate range test</title><style>
:root{{color-scheme:light dark;--ink:#1d2433;--muted:#5b6474;--line:#dfe3ea;--accent:#2563a8;--best:#b45309;--ground:#fff}}
@media (prefers-color-scheme:dark){{:root{{--ink:#e6e9ef;--muted:#a0a9b8;--line:#363e4c;--accent:#7ab2f2;--best:#f0a44b;
 --ground:#14181f}}}}
body{{margin:0 auto;padding:20px 16px 48px;max-width:760px;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
 background:var(--ground)}}
h1{{font-size:1.5rem;margin:0 0 .25rem}} h2{{font-size:1.05rem;margin:1.75rem 0 .5rem}} p{{margin:.25rem 0 1rem}}
.muted{{color:var(--muted)}} code{{font:.95em ui-monospace,monospace}}
svg{{display:block;width:100%;height:auto;max-width:600px;font:12px system-ui,sans-serif}} svg text{{fill:var(--ink)}}
svg .muted{{fill:var(--muted)}} .axis{{stroke:var(--line);fill:none}} .raw{{fill:var(--accent);opacity:.35}}
.curve{{stroke:var(--accent);fill:none;stroke-width:2;stroke-linejoin:round}}
.mark{{stroke:var(--best);fill:none;stroke-width:1.5}} .mark.tenth{{stroke-dasharray:5 4}} .dot{{fill:var(--best)}}
svg .name{{fill:var(--best);font-weight:600}}
table{{border-collapse:collapse;font-size:.9rem}} th{{font-weight:600}}
th,td{{text-align:right;padding:4px 0 4px 28px;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}}
th:first-child,td:first-child{{padding-left:0}}
</style></head><body>
<h1>Learning rate range test</h1><p class="muted">{summary}</p>
{plot}
<h2>Suggestion</h2><p>{suggestion}</p>
<h2>Losses</h2>{table}
</body></html>
"""


def page(found: Found) -> str:
    """The whole page."""
    ended = "ended early, because the loss diverged" if found.diverged else "went to the end of the range"
    summary = (
        f"{len(found.rates)} steps with {found.optimizer}, the rate growing from {_rate(found.rates[0])} to"
        f" {_rate(found.rates[-1])}; the run {ended}."
    )
    rows = "".join(f"<tr><td>{rate}</td><td>{loss}</td><td>{mean}</td></tr>" for rate, loss, mean in rows_of(found))
    head = "<tr><th>rate</th><th>loss</th><th>smoothed</th></tr>"
    return _PAGE.format(
        summary=html.escape(summary),
        plot=plot(found),
        suggestion=_suggestion(found),
        table=f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>",
    )


def text(found: Found) -> str:
    """The same for a terminal."""
    lines = [f"{'rate':>10} {'loss':>10} {'smoothed':>10}"]
    lines += [f"{rate:>10} {loss:>10} {mean:>10}" for rate, loss, mean in rows_of(found)]
    if found.steepest is None or found.tenth is None:
        return "\n".join([*lines, "", f"no suggestion: {_WHY_NOT}"])
    return "\n".join([
        *lines,
        "",
        f"steepest descent:       {found.words(found.steepest)}",
        f"a tenth of the lowest:  {found.words(found.tenth)}",
    ])  # fmt: skip


_WHY_NOT = "the loss never fell; try a lower --start-lr, or more steps with --num-iter"


def _suggestion(found: Found) -> str:
    if found.steepest is None or found.tenth is None:
        return html.escape(f"None: {_WHY_NOT}.")
    return (
        f"<code>{html.escape(found.words(found.steepest))}</code>, where the loss falls fastest. A tenth of the rate at which"
        f" it is lowest is <code>{html.escape(found.words(found.tenth))}</code>; a rate between the two is a good start."
    )


def rows_of(found: Found) -> list[tuple[str, str, str]]:
    """(rate, loss, smoothed loss) of some steps at equal distances, the last among them."""
    last = len(found.rates) - 1
    chosen = sorted({round(last * row / (ROWS - 1)) for row in range(ROWS)})
    return [(_rate(found.rates[i]), f"{found.losses[i]:.4f}", f"{found.smoothed[i]:.4f}") for i in chosen]


def _rate(rate: float) -> str:
    return f"{rate:.2g}".replace("e-0", "e-")


def plot(found: Found) -> str:
    """The losses over the logarithm of the rate as SVG, with a line at each suggestion."""
    left, right = math.log10(found.rates[0]), math.log10(found.rates[-1])
    low, high = _range(found)

    def x(rate: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(rate) - left) / (right - left)

    def y(loss: float) -> float:
        share = (min(max(loss, low), high) - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [_axes(left, right, low, high, x, y)]
    parts += [
        f'<circle class="raw" cx="{x(rate):.1f}" cy="{y(loss):.1f}" r="1.8"/>'
        for rate, loss in zip(found.rates, found.losses, strict=True)
        if low <= loss <= high
    ]
    points = (f"{x(rate):.1f} {y(loss):.1f}" for rate, loss in zip(found.rates, found.smoothed, strict=True))
    parts.append(f'<path class="curve" d="M{"L".join(points)}"/>')
    if found.steepest is not None and found.tenth is not None:
        parts.append(_marks(found, x, y))
    label = "loss over the learning rate"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )


def _range(found: Found) -> tuple[float, float]:
    """Lowest and highest loss that are shown: what has diverged would flatten the rest."""
    low, first = min(found.smoothed), found.smoothed[0]
    high = min(max(found.smoothed), first + max(first - low, 0.1 * abs(first)))
    pad = (high - low) * 0.06 or 1.0
    return low - pad, high + pad


def _axes(
    left: float, right: float, low: float, high: float, x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    parts = []
    for loss in ticks(low, high):
        parts.append(f'<path class="axis" d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(loss) + 4, f"{loss:.4g}", "end", "muted"))
    decades = [10.0**power for power in range(math.ceil(left - 1e-9), math.floor(right + 1e-9) + 1)]
    for rate in decades[:: max(1, len(decades) // 7)]:
        parts.append(f'<path class="axis" d="M{x(rate):.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(_text(x(rate), HEIGHT - BOTTOM + 18, _rate(rate), "middle", "muted"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "learning rate", "end", "muted"))
    return "".join(parts)


def _marks(found: Found, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """A line and a name for each suggestion; the names one above the other, on the side that has room.

    The line that reaches up to the higher name is the one that does not cross the lower name.
    """
    assert found.steepest is not None
    assert found.tenth is not None
    marks = sorted([(found.steepest, "steepest", ""), (found.tenth, "lowest / 10", " tenth")])
    first, second = x(marks[0][0]), x(marks[1][0])
    if second + NAME < WIDTH - RIGHT:
        sides, rises = (True, True), (24, 10)
    else:
        sides, rises = (first - NAME <= LEFT, False), (10, 24)
    parts = []
    for (rate, name, kind), right, rise in zip(marks, sides, rises, strict=True):
        parts.append(f'<path class="mark{kind}" d="M{x(rate):.1f} {TOP - rise + 4}V{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x(rate) + (4 if right else -4), TOP - rise, name, "start" if right else "end", "name"))
    place = found.rates.index(found.steepest)
    parts.append(f'<circle class="dot" cx="{x(found.steepest):.1f}" cy="{y(found.smoothed[place]):.1f}" r="4"/>')
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(words)}</text>'
