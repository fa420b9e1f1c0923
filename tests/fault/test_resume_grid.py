"""Saved under one plan and stopped anywhere, resumed under the same or another: a grid of 200 cases, or a sample of it.

A case is drawn from its seed: the plan and ranks that save, how often, whether in the background, the step of the end, and the
plan and ranks that go on. What is in the background when the first one ends is lost, as in a kill.
`make fault FULL=1 ARGS="-k resume_grid"` runs all, `SEED=17 make fault` that one alone.
"""

from __future__ import annotations

import os
import random

import pytest

from tests import grid
from tests.plan_cases import BATCH, Case, run_cases
from trainer.config.load import load
from trainer.parallel.dims import resolve

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.parallel, pytest.mark.timeout(3600)]

STEPS = 30
# name -> (ranks, parameters)
PLANS: dict[str, tuple[int, tuple[str, ...]]] = {
    "alone": (1, ()),
    "ddp-2": (2, ()),
    "zero1-2": (2, ("parallel.zero=1",)),
    "zero2-2": (2, ("parallel.zero=2",)),
    "zero3-2": (2, ("parallel.zero=3",)),
    "tp-2": (2, ("parallel.tp=2", "parallel.sequence_parallel=false")),
    "tp-sequence-2": (2, ("parallel.tp=2",)),
    "ddp-3": (3, ()),
    "zero3-3": (3, ("parallel.zero=3",)),
    "ddp-4": (4, ()),
    "zero1-4": (4, ("parallel.zero=1",)),
    "zero3-4": (4, ("parallel.zero=3",)),
    "hsdp-2x2": (4, ("parallel.zero=3", "parallel.dp_replicate=2", "parallel.dp_shard=2")),
    "tp-2-zero3-2": (4, ("parallel.tp=2", "parallel.zero=3")),
    "pp-2": (2, ("parallel.pp=2",)),
    "pp-2-gpipe-ddp-2": (4, ("parallel.pp=2", "parallel.pipeline.schedule=gpipe")),
    "pp-2-zero3-2": (4, ("parallel.pp=2", "parallel.zero=3")),
    "pp-2-tp-2": (4, ("parallel.pp=2", "parallel.tp=2")),
    "tp-4": (4, ("parallel.tp=4",)),
}
FULL = 200
SAMPLE = 12


def drawn(seed: int) -> tuple[str, str, int, bool, int]:
    """(plan that saves, plan that goes on, steps between checkpoints, background, last step of the first) of a case."""
    rng = random.Random(seed)
    first = rng.choice(list(PLANS))
    # Every second case goes on as it was: there nothing may change by a bit.
    second = first if seed % 2 else rng.choice(list(PLANS))
    return first, second, rng.choice((2, 3, 5, 7)), rng.random() < 0.5, rng.randrange(8, STEPS)


def seeds() -> list[int]:
    """Those of the grid, in the same order each time; SEED of the environment alone if it is given."""
    return [grid.seed()] if os.environ.get("SEED") else list(range(grid.cases(SAMPLE, FULL)))


def test_resumed_at_any_point_under_any_plan_the_losses_are_the_same(tmp_path):
    cases: dict[str, Case] = {}
    for seed in seeds():
        first, second, every, background, stop = drawn(seed)
        print(
            f"seed {seed}: {first} saves every {every} steps, background {background}, ends at {stop}, {second} goes on"
        )
        for name in (first, second):
            ranks, words = PLANS[name]
            cases[f"whole-{name}"] = Case(f"whole-{name}", ranks, (*words, f"train.max_steps={STEPS}"))
        ranks, words = PLANS[first]
        # The examples of a micro-batch are part of what a run is; the ranks that share a step's batch are not.
        batch = max(1, BATCH // resolve(load(None, words).parallel, ranks).data)
        words = (*words, f"train.checkpoint_every={every}", f"train.checkpoint_async={str(background).lower()}")
        words = (*words, f"train.max_steps={STEPS}")
        cases[f"saved-{seed}"] = Case(f"saved-{seed}", ranks, words, scratch=f"s{seed}", stop=stop, batch=batch)
        ranks, words = PLANS[second]
        words = (*words, f"train.max_steps={STEPS}")
        cases[f"again-{seed}"] = Case(f"again-{seed}", ranks, words, scratch=f"s{seed}", batch=batch)
    results = run_cases(tmp_path, cases.values(), deadline_s=3400.0)
    wrong, from_background = [], 0
    for seed in seeds():
        first, second, every, background, stop = drawn(seed)
        whole, again = results[f"whole-{first}"], results[f"again-{seed}"]
        from_background += background and again.get("resumed", 0) > 0
        said = f"seed {seed}: {first} -> {second}, every {every}, stopped at {stop}: "
        # Later than the last of its steps where an evaluation found the best score: that is kept too.
        least = 0 if background else (stop - 1) // every * every
        if again.get("error") or not least <= again["resumed"] < stop:
            wrong.append(said + str(again.get("error", f"resumed at {again.get('resumed')}")))
        elif first == second and (again["losses"], again["weights"]) != (whole["losses"], whole["weights"]):
            wrong.append(said + "not the same bits")
        else:
            pairs = zip(map(float.fromhex, again["losses"]), map(float.fromhex, whole["losses"]), strict=True)
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            print(f"{said}resumed at {again['resumed']}: {worst:.1e}")
            if worst > 1e-6:
                wrong.append(f"{said}losses differ by {worst:.1e}")
    assert not wrong, "\n".join(wrong)
    assert from_background or len(seeds()) == 1, "none has gone on from what was saved in the background"
