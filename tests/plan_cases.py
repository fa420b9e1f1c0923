"""Trainings under parallel plans, many in one start of a few processes over gloo.

    results = run_cases(folder, [Case("killed", 4, ("parallel.zero=3",), scratch="a", stop=20),
                                 Case("again", 2, scratch="b", source="a")])

Each case trains a tiny model on the first `ranks` processes; the cases run one after the other. A case that names a
`scratch` that another has used before goes on from its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks

SHAPE = ("model.dim=32", "model.layers=2", "model.heads=4", "model.ff=48")
# model -> (task, parameters)
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "decoder": ("lm", (*SHAPE, "model.kv_heads=4")),
    "encoder": ("classify", SHAPE),
    "vit": ("image", (*SHAPE, "model.patch=2")),
    "ngram": ("classify", ("model.dim=8", "model.buckets=50")),
    "cnn": ("image", ("model.width=4",)),
}
ALL = (
    "model.dropout=0", "train.threads=1", "train.log_every=1", "parallel.timeout_s=60", "train.max_steps=12",
    "train.schedule=constant", "train.lr=0.003", "train.statistics_every=6",
)  # fmt: skip
BATCH = 8
# What the losses of a plan are compared over where there is time for it.
LONG = "train.max_steps=50"


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: of its result.
        ranks: processes that train together.
        words: parameters, beside those of the model and `ALL`.
        model: of `MODELS`.
        scratch: name of the folder of its checkpoints; empty keeps none.
        source: another's scratch, which this one's is a copy of at first.
        batch: examples of a micro-batch; 0 makes a step take `BATCH` examples.
        stop: step after which it ends as if it were killed; 0 goes to the end.
        term: step after which the last rank, and none else, gets SIGTERM; 0 is never.
    """

    name: str
    ranks: int
    words: tuple[str, ...] = ()
    model: str = "decoder"
    scratch: str = ""
    source: str = ""
    batch: int = 0
    stop: int = 0
    term: int = 0


class Kept:
    """A sink that keeps the rows of `train.statistics_every`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def resume(self, step: int, evaluated: int) -> None:
        """Nothing."""

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep it, if it is one."""
        if any(name.startswith("update_ratio/") for name in figures):
            self.rows.append({"step": step, **figures})

    def close(self, ok: bool) -> None:
        """Nothing."""


def assert_same_statistics(result: Mapping[str, Any], one: Mapping[str, Any]) -> None:
    """Whether the first rows of `train.statistics_every` are those of one process: every block, all norms."""
    import pytest

    first, alone = result["statistics"][0], one["statistics"][0]
    assert {"grad_norm/blocks.1", "weight_norm/embedding", "update_ratio/norm"} <= set(alone)
    assert first == pytest.approx(alone, rel=1e-3)


def numbers(result: Mapping[str, Any], what: str = "losses") -> list[float]:
    """The figures of a case that has not failed."""
    assert "error" not in result, result["error"]
    return [float.fromhex(value) for value in result[what]]


def assert_equal(result: Mapping[str, Any], one: Mapping[str, Any]) -> None:
    """Whether a case has learned as one process has: losses to five digits."""
    import pytest

    assert len(numbers(result)) == len(numbers(one))
    assert numbers(result) == pytest.approx(numbers(one), rel=5e-6)
    assert numbers(result, "norms") == pytest.approx(numbers(one, "norms"), rel=1e-4)
    assert numbers(result, "evaluations") == pytest.approx(numbers(one, "evaluations"), rel=5e-6)


class Stopped(Exception):
    """The step at which a case ends has come."""


def main(folder: Path) -> None:
    """Run the cases of FOLDER/cases.json as the rank that RANK names."""
    cases = [
        Case(**{**each, "words": tuple(each["words"])}) for each in json.loads((folder / "cases.json").read_text())
    ]
    for number, case in enumerate(cases):
        # A case's collectives know nothing of those before it.
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(number), "WORLD_SIZE": str(case.ranks)}
        if int(os.environ["RANK"]) < case.ranks:
            print(f"-- {case}", flush=True)
            _run(folder, case)


def run_cases(
    folder: Path, cases: Iterable[Case], deadline_s: float = 240.0, work: Callable[[Path], None] = main
) -> dict[str, dict[str, Any]]:
    """Run cases; their results by name. Each rank calls `work(folder)`, which is or calls `main`.

    A result has `losses`, `norms` and `evaluations` (as `float.hex`), `statistics` (rows), `weights` (a digest),
    `resumed` (the step) and `error` (what a MillraceError said).
    """
    from tests.tiny import tiny_dataset

    cases = list(cases)
    assert len({case.name for case in cases}) == len(cases)
    folder.mkdir(parents=True, exist_ok=True)
    for task in {MODELS[case.model][0] for case in cases}:
        tiny_dataset(folder / task, task, rows=60, max_length=16)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    run_ranks(work, folder, max(case.ranks for case in cases), deadline_s)
    return {case.name: json.loads((folder / f"{case.name}.json").read_text()) for case in cases}


def _run(folder: Path, case: Case) -> None:
    import torch

    from trainer.errors import MillraceError
    from trainer.parallel.group import process_group

    result: dict[str, Any]
    with process_group("auto", 60.0, torch.device("cpu")):
        try:
            result = train(folder, case)
        except Stopped:
            result = {"stopped": case.stop}
        except MillraceError as error:
            result = {"error": f"{error.message}; {error.hint}"}
    if os.environ["RANK"] == "0":
        (folder / f"{case.name}.json").write_text(json.dumps(result))


def train(folder: Path, case: Case) -> dict[str, Any]:
    """Train as a case says, in a process group."""
    import torch

    from trainer import models, tasks
    from trainer.artifacts.dataset import Dataset
    from trainer.config.load import load, with_values
    from trainer.models.shapes import shapes_only
    from trainer.parallel.dims import resolve
    from trainer.train import checkpoint
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    # Checkpoints at the very steps that are asked for, whatever they cost.
    checkpoint.SHARE = 1e9
    rank = int(os.environ["RANK"])
    name, words = MODELS[case.model]
    names = [f"task.name={name}", f"model.name={case.model}", f"distill.student.name={case.model}"]
    given = load(None, [*names, *words, *ALL, *case.words])
    each = case.batch or max(1, BATCH // resolve(given.parallel, case.ranks).data // given.train.accumulation)
    params = with_values(given, {"train.batch_size": each})
    scratch = folder / "scratch" / case.scratch if case.scratch else None
    if case.source and scratch and rank == 0:
        shutil.copytree(folder / "scratch" / case.source, scratch)
    dataset = Dataset(folder / name)
    task = tasks.build(params, dataset)
    seed_all(params.train.seed)
    with shapes_only() if rank else nullcontext():
        model = models.build(params.model, dataset.spec)
    steps: list[int] = []

    def on_step(step: int, total: int, _: torch.nn.Module) -> None:
        steps.append(step)
        if step == case.stop:
            raise Stopped
        if step == case.term and rank == case.ranks - 1:
            signal.raise_signal(signal.SIGTERM)

    kept = Kept()
    fitted = fit(params, task, model, scratch=scratch, on_step=on_step, sinks=[kept] if rank == 0 else [])
    if rank:
        return {}
    digest = hashlib.sha256()
    for name, value in sorted(fitted.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    rows = fitted.history
    return {
        "losses": [row["train_loss"].hex() for row in rows if "train_loss" in row],
        "norms": [row["grad_norm"].hex() for row in rows if "grad_norm" in row],
        "evaluations": [row["val_loss"].hex() for row in rows if "val_loss" in row],
        "statistics": kept.rows,
        "weights": digest.hexdigest(),
        "resumed": steps[0] - 1 if steps else fitted.steps,
    }
