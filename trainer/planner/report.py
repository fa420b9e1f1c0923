"""A plan as figures for machines, and as a page for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.errors import ConfigError
from trainer.parallel.gpus import GIB, PRICES_OF
from trainer.planner.layout import Layout
from trainer.planner.search import Choice, Problem, choices, evaluate, fits, refusal
from trainer.planner.throughput import peak_of

# Bytes/s at which a node writes to its store: a bucket far away, a parallel file system nearby.
STORE = (0.5e9, 5e9)
# Other meshes that are shown beside the proposed one.
OTHERS = 3

Style = Callable[..., str]


def plan(problem: Problem, tokens: float | None, price: float | None, layout: Layout | None = None) -> dict[str, Any]:
    """What a run takes, as plain figures: bytes, seconds, tokens per second, US dollars; ranges are [low, high].

    Args:
        problem: what is asked for.
        tokens: tokens to train on; None takes `train.max_steps`, or leaves days and cost out.
        price: US dollars per GPU-hour; None takes the table's range.
        layout: the layout to take; None looks for the best.

    Raises:
        ConfigError: it does not fit, and what would.
    """
    if layout is None:
        found = choices(problem)
        if not found:
            raise refusal(problem)
    else:
        found = [evaluate(problem, layout)]
        if not fits(problem, found[0].memory):
            raise refusal(problem, found[0])
    best, others = found[0], _others(found)
    per_step = best.layout.sequences * problem.shape.length
    steps = tokens / per_step if tokens else float(problem.train.max_steps) or None
    shape = problem.shape
    return {
        "model": {
            "parameters": shape.num_parameters,
            "sequence": shape.length,
            "flops_per_token": shape.flops_per_token,
        },
        "gpus": {
            "kind": problem.gpu.name,
            "number": problem.gpus,
            "per_node": problem.per_node,
            "memory": problem.gpu.memory,
        },
        "step": {"sequences": best.layout.sequences, "tokens": per_step},
        **_figures(problem, best),
        "run": _run(problem, best, steps, price),
        "checkpoint": _checkpoint(problem, best),
        "others": [_figures(problem, other) for other in others],
    }


def _others(found: list[Choice]) -> list[Choice]:
    """The best layouts whose mesh is another."""
    seen = {_mesh(found[0].layout)}
    others: list[Choice] = []
    for each in found[1:]:
        if _mesh(each.layout) not in seen and len(others) < OTHERS:
            seen.add(_mesh(each.layout))
            others.append(each)
    return others


def _mesh(layout: Layout) -> str:
    parts = {"pp": layout.pp, "dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "tp": layout.tp}
    text = " x ".join(f"{name} {length}" for name, length in parts.items() if length > 1) or "1 GPU"
    return f"{text}, zero {layout.zero}" if layout.zero else text


def _figures(problem: Problem, choice: Choice) -> dict[str, Any]:
    layout, gpus = choice.layout, problem.gpus
    tokens = layout.sequences * problem.shape.length
    peak = peak_of(problem.gpu, layout.precision)
    speeds = [tokens / choice.slow.total, tokens / choice.fast.total]
    return {
        "mesh": _mesh(layout),
        "set": layout.words(),
        "memory": {"parts": choice.memory.parts, "total": choice.memory.total, "at": choice.memory.moment},
        "seconds": {"total": [choice.slow.total, choice.fast.total], "parts": _both(choice)},
        "tokens_per_s": speeds,
        "tokens_per_s_per_gpu": [speed / gpus for speed in speeds],
        "mfu": [speed * problem.shape.flops_per_token / (gpus * peak) for speed in speeds],
    }


def _both(choice: Choice) -> dict[str, list[float]]:
    return {name: [seconds, choice.fast.parts.get(name, 0.0)] for name, seconds in choice.slow.parts.items()}


def _run(problem: Problem, choice: Choice, steps: float | None, price: float | None) -> dict[str, Any] | None:
    """Days and cost; None where neither tokens nor steps are given."""
    if not steps:
        return None
    days = [steps * times.total / 86400 for times in (choice.slow, choice.fast)]
    hours = [each * 24 * problem.gpus for each in days]
    low, high = (price, price) if price is not None else problem.gpu.price
    return {
        "steps": steps,
        "tokens": steps * choice.layout.sequences * problem.shape.length,
        "days": days,
        "gpu_hours": hours,
        "price_per_gpu_hour": [low, high],
        "cost": [hours[1] * low, hours[0] * high],
    }


def _checkpoint(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Bytes of a checkpoint (weights, best weights, optimizer's state), and seconds until it is written."""
    from trainer.planner.states import state_bytes

    shape, layout = problem.shape, choice.layout
    state = sum(
        size * times for size, times in zip(state_bytes(shape, layout.optimizer), (shape.layers, 1), strict=True)
    )
    size = 8.0 * shape.num_parameters + state
    nodes = max(1, problem.gpus // problem.per_node)
    # Of replicas, one writes.
    writers = max(1, nodes // layout.dp_replicate)
    return {"bytes": size, "seconds": [size / (speed * writers) for speed in STORE]}


# -- for people -----------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any], name: str, paint: Style) -> list[str]:
    """The page of a terminal; `paint(text, *styles)` gives a text its style."""
    gpus, model, step, memory = (found[key] for key in ("gpus", "model", "step", "memory"))
    nodes = -(-gpus["number"] // gpus["per_node"])
    where = f"{gpus['number']:,} x {gpus['kind']}" + (f", {nodes:,} nodes of {gpus['per_node']}" if nodes > 1 else "")
    head = [
        ("model", f"{count(model['parameters'])} parameters, sequences of {model['sequence']:,} tokens"),
        ("mesh", found["mesh"]),
        ("step", f"{step['sequences']:,} sequences, {count(step['tokens'])} tokens: {_batch(found['set'])}"),
    ]
    out = ["", f"  {paint(name, 'bold')} on {where}", ""]
    out += [f"  {paint(f'{key:<12}', 'dim')}{value}" for key, value in head]
    titles = [f"{'memory of a GPU':<34}{'GiB':>10}{'share':>8}", f"{'':<28}{'cautious':>14}{'hopeful':>14}"]
    out += ["", f"  {paint(titles[0], 'dim')}"]
    for part, size in memory["parts"].items():
        out.append(f"  {part:<34}{size / GIB:>10,.1f}{size / gpus['memory']:>8.0%}")
    label = f"together, of {gpus['memory'] / GIB:,.1f}"
    total = f"{label:<34}{memory['total'] / GIB:>10,.1f}{memory['total'] / gpus['memory']:>8.0%}"
    out += [f"  {paint(total, 'bold')}", "", f"  {paint(titles[1], 'dim')}"]
    out += [f"  {label:<28}{low:>14}{high:>14}" for label, low, high in _ranges(found)]
    out += ["", f"  {paint('checkpoint', 'dim')}  {data(found['checkpoint']['bytes'])}, written in "
            f"{seconds(found['checkpoint']['seconds'][1])} to {seconds(found['checkpoint']['seconds'][0])}"]  # fmt: skip
    if found["run"] is None:
        out.append(f"  {paint('days, cost', 'dim')}  not given: add --tokens or --steps")
    title = f"{'other meshes':<38}{'GiB':>8}{'tokens/s a GPU':>20}"
    out += ["", f"  {paint(title, 'dim')}"] if found["others"] else []
    for other in found["others"]:
        low, high = other["tokens_per_s_per_gpu"]
        out.append(f"  {other['mesh']:<38}{other['memory']['total'] / GIB:>8,.1f}{f'{low:,.0f} to {high:,.0f}':>20}")
    words = [f"{key}={value}" for key, value in found["set"].items()]
    out += ["", f"  {paint('Set', 'bold')}"]
    return [*out, *(f"    {' '.join(words[i : i + 3])}" for i in range(0, len(words), 3))]


def _ranges(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, list[float], str]] = [
        ("seconds a step", found["seconds"]["total"], "{:,.2f}"),
        ("tokens/s", found["tokens_per_s"], "{:,.0f}"),
        ("tokens/s of a GPU", found["tokens_per_s_per_gpu"], "{:,.0f}"),
        ("MFU", found["mfu"], "{:.0%}"),
    ]
    run = found["run"]
    if run:
        low, high = run["price_per_gpu_hour"]
        each = f"${low:,.2f}" if low == high else f"${low:,.2f}-{high:,.2f}, {PRICES_OF}"
        rows += [
            (f"days for {count(run['tokens'])} tokens", run["days"], "{:,.1f}"),
            ("GPU-hours", run["gpu_hours"], "{:,.0f}"),
            (f"cost ({each})", run["cost"][::-1], "${:,.0f}"),
        ]
    return [(label, form.format(slow), form.format(fast)) for label, (slow, fast), form in rows]


def _batch(words: dict[str, Any]) -> str:
    parts = words.get("parallel.pipeline.microbatches")
    text = f"micro-batch {words['train.batch_size']}"
    if parts:
        text += f" in {parts} parts"
    if words["train.accumulation"] > 1:
        text += f", {words['train.accumulation']} of them"
    mode = words["train.recompute.mode"]
    return text + (f", recompute {mode}" if mode != "none" else "")


def count(value: float) -> str:
    """A number for people: 950, 2.35 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def data(size: float) -> str:
    """A number of bytes: 38 GB."""
    return next(
        (f"{size / unit:.3g} {name}" for unit, name in ((1e12, "TB"), (1e9, "GB")) if size >= unit),
        f"{size / 1e6:.3g} MB",
    )


def seconds(value: float) -> str:
    """A duration: 4 s, 3 min."""
    return f"{value:.2g} s" if value < 100 else f"{value / 60:.0f} min"


def parse_count(word: str, flag: str) -> float:
    """A count as people write it: 300e9, 300B, 1.5T.

    Raises:
        ConfigError: it is none.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    text = word.strip().replace("_", "").replace(",", "")
    try:
        unit = units.get(text[-1:].lower(), 0)
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise ConfigError(f"{flag} {word}: not a count above 0", f"write {flag} 300e9 or {flag} 300B")
    return value
