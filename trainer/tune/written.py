"""The files of artifact `tuning`, and what its manifest says: the same for the local search and for one of Katib's.

Imports no torch, numpy or optuna: the launcher, which writes them for Katib's, has none of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.config import Params
from trainer.tune import plots
from trainer.tune.search import Search

VOLATILE = ("trials.jsonl", "search.json", "search.html")  # they hold durations


def write(out: Path, params: Params, found: Search | None) -> dict[str, Any]:
    """Write the four files; returns the content of best.json."""
    tune = params.tune
    best: dict[str, Any] = {"params": {}, "value": None, "metric": tune.metric, "direction": tune.direction}
    best["trial"] = found.best.number if found else None
    if found:
        best |= {"params": found.best.params, "value": found.best.value}
    rows = [asdict(trial) for trial in found.trials] if found else []
    data = {
        "metric": tune.metric, "direction": tune.direction, "sampler": tune.sampler, "pruner": tune.pruner,
        "seed": tune.seed, "space": {key: each.model_dump(mode="json") for key, each in tune.space.items()},
        "best": best, "trials": rows, "importance": found.importance if found else {},
    }  # fmt: skip
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.write_json(out / "best.json", best)
    (out / "trials.jsonl").write_text(lines, encoding="utf-8")
    storage.write_json(out / "search.json", data)
    (out / "search.html").write_text(plots.page(data), encoding="utf-8")
    return best


def meta_of(params: Params, found: Search | None) -> dict[str, dict[str, Any]]:
    """What the manifest of `tuning` says."""
    if found is None:
        return {"tuning": {"enabled": False, "params": {}}}
    return {"tuning": {"enabled": True, "params": found.best.params, "metric": params.tune.metric}}


def metrics_of(params: Params, found: Search) -> dict[str, float]:
    """Figures of a search: its best value, and how many trials there were, were pruned and failed."""
    states = [trial.state for trial in found.trials]
    return {
        f"best_{params.tune.metric}": float(found.best.value or 0.0),
        "num_trials": float(len(states)),
        "num_pruned": float(states.count("pruned")),
        "num_failed": float(states.count("failed")),
    }
