"""Charts of the report as inline SVG: lines, calibration, differences with intervals, confusion matrix, pictures.

Drawn in units of a CSS pixel at a width of 360, so that 12-unit text reads on a phone; colours come from custom
properties of report.css, light and dark. All text is escaped here.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 34


def esc(value: Any) -> str:
    """Text that can stand anywhere in HTML, quoted attributes included."""
    return html.escape(str(value), quote=True)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, label: str) -> str:
    """A line for each series, with its name at the top; a point alone is drawn as a dot.

    Args:
        series: name -> (x, y) points in the order of x; not finite ones are left out.
        x_name: name of the x axis.
        label: what the chart shows, for screen readers.
    """
    series = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    points = [point for each in series.values() for point in each]
    if not points:
        return '<p class="muted">Nothing was recorded.</p>'
    x_low, x_high = _span([x for x, _ in points], pad=0)
    y_low, y_high = _span([y for _, y in points])

    def at(x: float, y: float) -> tuple[float, float]:
        px = LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / (x_high - x_low)
        return px, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - y_low) / (y_high - y_low))

    parts = []
    for tick in ticks(y_low, y_high):
        _, py = at(x_low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, py + 4, _short(tick), "end", "muted"))
    for tick in ticks(x_low, x_high):
        px, _ = at(tick, y_low)
        parts.append(_text(px, HEIGHT - BOTTOM + 16, _short(tick), "middle", "muted"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 3, x_name, "end", "muted"))
    for number, (_, each) in enumerate(series.items()):
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in (at(x, y) for x, y in each))
        if len(each) > 1:
            parts.append(f'<path class="line s{number % 4}" d="M{path}"/>')
        if each and len(each) <= 30:
            parts += [
                f'<circle class="dot s{number % 4}" cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="3">'
                f"<title>{esc(f'{x_name} {_short(x)}: {y:.5g}')}</title></circle>"
                for x, y in each
            ]
    return legend(list(series)) + _svg(label, parts, WIDTH, HEIGHT)


def legend(names: Sequence[str]) -> str:
    """A key of the series' colours."""
    keys = "".join(f'<span class="key s{number % 4}">{esc(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{keys}</p>' if len(names) > 1 else ""


def calibration(bins: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in each bin of confidence, beside the diagonal on which a calibrated model lies."""
    size, left, bottom = 300, 50, 40
    top, right = 12, 22
    width, height = size, size

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - right) * x, top + (height - top - bottom) * (1 - y)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        px, py = at(tick, tick)
        parts.append(f'<path class="grid" d="M{left} {py:.1f}H{width - right}"/>')
        parts.append(_text(left - 6, py + 4, f"{tick:.0%}", "end", "muted"))
        parts.append(_text(px, height - bottom + 16, f"{tick:.0%}", "middle", "muted"))
    most = max((each["rows"] for each in bins), default=1)
    for each in bins:
        (x0, y0), (x1, base) = at(each["low"], each["accuracy"]), at(each["high"], 0)
        title = f"confidence {each['confidence']:.1%}, accuracy {each['accuracy']:.1%}, {each['rows']:,} rows"
        parts.append(
            f'<rect class="bar" x="{x0 + 0.5:.1f}" y="{y0:.1f}" width="{max(x1 - x0 - 1, 1):.1f}"'
            f' height="{max(base - y0, 0.5):.1f}" opacity="{0.3 + 0.7 * each["rows"] / most:.2f}"><title>{title}</title></rect>'
        )
    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts.append(f'<path class="diagonal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    parts.append(_text((left + width - right) / 2, height - 4, "confidence", "middle", "muted"))
    parts.append(
        f'<text class="muted" text-anchor="middle" transform="translate(12 {(top + height - bottom) / 2}) rotate(-90)">'
        "share right</text>"
    )
    return _svg("share of right predictions by confidence", parts, width, height, "small")


def differences(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str, scale: float = 1.0) -> str:
    """Differences with their confidence intervals around zero.

    Args:
        rows: (what is compared, {"value", "low", "high"}).
        unit: unit of the axis.
        scale: factor from the values to the unit.
    """
    if not rows:
        return ""
    ends = [end * scale for _, each in rows for end in (each["low"], each["high"])]
    low, high = _span([*ends, 0.0])
    row, left, right = 46, 14, 14

    def at(value: float) -> float:
        return left + (WIDTH - left - right) * (value - low) / (high - low)

    height = row * len(rows) + 30
    parts = []
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{at(tick):.1f} 4V{height - 26}"/>')
        parts.append(_text(at(tick), height - 10, _short(tick), "middle", "muted"))
    parts.append(f'<path class="zero" d="M{at(0):.1f} 4V{height - 26}"/>')
    for number, (name, each) in enumerate(rows):
        y = row * number + 34
        ends_at = [at(each[end] * scale) for end in ("low", "value", "high")]
        parts.append(f'<path class="whisker" d="M{ends_at[0]:.1f} {y}H{ends_at[2]:.1f}"/>')
        parts.append(f'<circle class="dot s0" cx="{ends_at[1]:.1f}" cy="{y}" r="5"/>')
        parts.append(_halo(left, y - 14, name))
    return _svg(f"differences with confidence intervals, {unit}", parts, WIDTH, height)


_MATRIX_WIDTH = 728


def confusion(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Counts of actual (rows) against predicted labels (columns), shaded by their share of the row.

    It keeps a size at which its text can be read, and is scrolled where the page is narrower.
    """
    longest = min(max(len(name) for name in names), 22)
    left = 14 + int(6.6 * longest)
    # Two thirds of a wide page, as long as two digits fit into a cell.
    fitting = (_MATRIX_WIDTH - left - int(3.8 * longest)) // len(names)
    cell = max(15, min(30 if len(names) <= 15 else 19, fitting))
    top = 14 + int(6.6 * longest * 0.87)
    width, height = left + cell * len(names) + int(3.8 * longest), top + cell * len(names) + 8
    totals = np.maximum(matrix.sum(axis=1), 1)
    parts = []
    for i, name in enumerate(names):
        middle = cell * i + cell / 2
        short = esc(_cut(name, 22))
        parts.append(f'<text class="tick" x="{left - 6}" y="{top + middle + 4:.1f}" text-anchor="end">{short}</text>')
        parts.append(
            f'<text class="tick" transform="translate({left + middle + 3:.1f} {top - 6}) rotate(-60)">{short}</text>'
        )
    parts.append(f'<rect class="frame" x="{left}" y="{top}" width="{cell * len(names)}" height="{cell * len(names)}"/>')
    for i, j in zip(*np.nonzero(matrix), strict=True):
        count, share = int(matrix[i, j]), matrix[i, j] / totals[i]
        kind = "right" if i == j else "wrong"
        x, y = left + cell * j, top + cell * i
        title = esc(f"{names[i]} taken for {names[j]}: {count} ({share:.0%})")
        parts.append(
            f'<g><title>{title}</title><rect class="{kind}" x="{x}" y="{y}" width="{cell}" height="{cell}"'
            f' fill-opacity="{0.12 + 0.88 * share:.2f}"/>'
            f'<text class="count{" on" if share > 0.45 else ""}" x="{x + cell / 2}" y="{y + cell / 2 + 3.5}">{count}</text></g>'
        )
    return (
        f'<div class="scroll"><svg class="matrix" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="confusion matrix">{"".join(parts)}</svg></div>'
    )


def bars(rows: Sequence[tuple[str, float]], shown: Any = None) -> str:
    """A list of names with bars, in HTML: it wraps by itself."""
    most = max((value for _, value in rows), default=1) or 1
    items = []
    for name, value in rows:
        text = shown(value) if shown else f"{value:,}"
        items.append(
            f'<li><span class="name">{esc(name)}</span><span class="track"><i style="width:{100 * value / most:.1f}%"></i>'
            f'</span><span class="value">{esc(text)}</span></li>'
        )
    return f'<ul class="bars">{"".join(items)}</ul>'


def picture(pixels: np.ndarray, label: str) -> str:
    """A picture, uint8 (channels, height, width), as an <img> that holds its PNG."""
    step = max(1, -(-max(pixels.shape[1:]) // 64))
    pixels = np.ascontiguousarray(pixels[:, ::step, ::step])
    channels, height, width = pixels.shape
    rows = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return f'<img class="picture" alt="{esc(label)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _svg(label: str, parts: Sequence[str], width: float, height: float, kind: str = "") -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{esc(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{esc(text)}</text>'


def _halo(x: float, y: float, text: str) -> str:
    return f'<text class="halo" x="{x:.1f}" y="{y:.1f}">{esc(text)}</text>'


def _span(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12:
        return low - 0.5, high + 0.5
    return low - pad * (high - low), high + pad * (high - low)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers between two ends."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw - 1e-12)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
