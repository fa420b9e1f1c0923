"""What preprocess and tune have to say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.views import markdown as md
from trainer.views.facts import Facts, Told

# Rows of a table; the others are counted.
LABELS = 20
TRIALS = 10
# Share of a range that counts as its end.
EDGE = 0.05
# Fewer rows than this in a split make a score that chance moves by whole points.
FEW_ROWS = 200
_REASONS = {
    "duplicate": "the same as another row",
    "near_duplicate": "nearly the same as another row",
    "rare_label": "label too rare (`data.min_label_rows`)",
    "over_max_rows": "over `data.max_rows`",
}


def preprocess(facts: Facts) -> Told:
    """Counts by split, by label and by reason of being dropped."""
    meta = facts.meta
    read, kept = int(meta["num_read"]), int(meta["kept"])
    dropped: Mapping[str, int] = meta.get("dropped") or {}
    labels: Mapping[str, int] = meta.get("label_counts") or {}
    lead = f"Read **{read:,}** rows from {md.code(meta['source'])}, kept **{kept:,}** ({md.share(kept / max(read, 1))})"
    lead += f" with **{len(labels):,}** labels" if labels else ""
    lead += ": cleaned, without duplicates, split by a hash of the content and packed for training."
    splits = [
        (
            name,
            md.number(rows),
            md.share(rows / max(kept, 1)),
            md.number(meta["tokens"][name]),
            md.size(meta["bytes"][name]),
        )
        for name, rows in meta["rows"].items()
    ]
    if meta.get("task") == "image":
        splits = [(*row[:3], "", "") for row in splits]
    body = [
        md.section("Splits", md.table(("split", "rows", "share", "tokens", "text"), splits)),
        md.section("Dropped rows", _dropped(dropped, read)),
        md.section("Labels", _labels(labels)),
    ]
    return Told(
        lead,
        body,
        _worth_knowing(meta, read, kept, dropped, labels),
        ["`card.md` in the artifact `dataset` has all counts; the next stages take the artifact as it is."],
    )


def _dropped(dropped: Mapping[str, int], read: int) -> str:
    ranked = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    rows = [(_reason(reason), md.number(count), md.share(count / max(read, 1))) for reason, count in ranked]
    return md.table(("because", "rows", "of all read"), rows) if rows else "None."


def _reason(reason: str) -> str:
    kind, _, rest = reason.partition(":")
    if kind == "malformed" and rest:
        return f"malformed: {md.prose(rest.replace('_', ' '))}"
    return _REASONS.get(reason) or md.prose(reason.replace("_", " "))


def _labels(labels: Mapping[str, int]) -> str:
    if not labels:
        return ""
    ranked = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    total = max(sum(labels.values()), 1)
    rows = [(md.code(label, 60), md.number(count), md.share(count / total)) for label, count in ranked[:LABELS]]
    if len(ranked) > LABELS:
        rest = sum(count for _, count in ranked[LABELS:])
        rows.append((f"{len(ranked) - LABELS:,} more", md.number(rest), md.share(rest / total)))
    return md.table(("label", "rows", "share"), rows)


def _worth_knowing(
    meta: Mapping[str, Any], read: int, kept: int, dropped: Mapping[str, int], labels: Mapping[str, int]
) -> list[str]:
    found = []
    limited = dropped.get("over_max_rows", 0)
    if limited:
        found.append(f"`data.max_rows` left {limited:,} good rows out: figures are those of a sample.")
    lost = read - kept - limited
    if read and lost / read > 0.2:
        found.append(f"{md.share(lost / read)} of the rows were dropped as unfit: look at the reasons above.")
    bad = sum(count for reason, count in dropped.items() if reason.startswith("malformed"))
    if bad:
        found.append(f"{bad:,} rows were malformed; the log names the first of them by file and line.")
    for name in ("val", "test"):
        rows = meta["rows"].get(name, 0)
        if 0 < rows < FEW_ROWS:
            what = f": one row is {100 / rows:.2g} points of accuracy" if labels else ", few to judge by"
            found.append(f"The {name} split has {rows:,} rows only{what}.")
    if labels:
        least, most = min(labels.values()), max(labels.values())
        if least < 10:
            rare = sum(count < 10 for count in labels.values())
            found.append(
                f"{rare:,} labels have fewer than 10 rows, too few to learn or to judge (`data.min_label_rows`)."
            )
        if most > 50 * least:
            found.append(
                f"The most frequent label has {most // max(least, 1):,} times the rows of the rarest: read macro-F1."
            )
    return found


def tune(facts: Facts) -> Told:
    """The best values, the best trials, and whether the search was wide enough."""
    best = facts.read("tuning", "best.json")
    if not best.get("params"):
        why = "`tune.enabled` is false" if facts.is_off("tune") else "there was nothing to search"
        return Told(
            f"**No search** ({why}): stage train takes the parameters as they are.",
            next=["`tune.enabled=true tune.trials=20` in the overrides of a run searches."],
        )
    search = facts.read("tuning", "search.json")
    trials = [trial for trial in search.get("trials", []) if isinstance(trial, dict)]
    metric = md.code(best["metric"])
    lead = (
        f"Best of **{len(trials):,}** trials: {metric} **{md.score(best['value'])}** with "
        + ", ".join(f"{md.code(key)} = {_value(value)}" for key, value in best["params"].items())
        + ". Stage train takes these values."
    )
    body = [md.section("Best trials", _trials(trials, best, search))]
    return Told(
        lead,
        body,
        _about_search(trials, best, search),
        ["`search` (HTML) of this step shows all trials, and which parameter mattered."],
    )


def _value(value: Any) -> str:
    return md.number(value) if isinstance(value, float) else md.code(value, 40)


def _trials(trials: list[dict[str, Any]], best: Mapping[str, Any], search: Mapping[str, Any]) -> str:
    """The best trials that were not cut short, then how many others there are."""
    sign = -1 if search.get("direction") == "maximize" else 1
    scored = [trial for trial in trials if isinstance(trial.get("value"), (int, float))]
    scored.sort(key=lambda trial: sign * trial["value"])
    names = list(best["params"])[:5]
    rows = [
        (
            f"{trial['number']}{' (best)' if trial['number'] == best.get('trial') else ''}",
            *(_value(trial["params"].get(name, "")) for name in names),
            md.score(trial["value"]),
            md.seconds(trial.get("seconds")),
        )
        for trial in scored[:TRIALS]
    ]
    head = ("trial", *(md.code(name) for name in names), md.code(best["metric"]), "time")
    return md.table(head, rows)


def _about_search(trials: list[dict[str, Any]], best: Mapping[str, Any], search: Mapping[str, Any]) -> list[str]:
    states = [trial.get("state") for trial in trials]
    found = []
    for state, words in (("pruned", "were stopped early because they fell behind"), ("failed", "failed")):
        if states.count(state):
            found.append(f"{states.count(state):,} of {len(states):,} trials {words}.")
    for name, value in best["params"].items():
        side = _edge(value, (search.get("space") or {}).get(name) or {})
        if side:
            found.append(f"The best {md.code(name)} lies at the {side} end of its range: widen `tune.space` there.")
    return found


def _edge(value: Any, dimension: Mapping[str, Any]) -> str:
    """`lower` or `upper` if a value lies in the outermost twentieth of its range."""
    ends = [
        float(each) for each in (value, dimension.get("low"), dimension.get("high")) if isinstance(each, (int, float))
    ]
    if len(ends) < 3:
        return ""
    at, low, high = map(math.log, ends) if dimension.get("log") else ends
    place = (at - low) / (high - low)
    if place < EDGE:
        return "lower"
    return "upper" if place > 1 - EDGE else ""
