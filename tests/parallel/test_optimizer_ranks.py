"""Two ranks train as one with every optimizer, and those that can work on shards come to the same there."""

from __future__ import annotations

import json

import pytest

from tests.parallel import optimizer_ranks
from tests.parallel.optimizer_ranks import losses
from tests.plan_cases import Case, run_cases
from tests.ranks import run_ranks
from tests.tiny import tiny_dataset
from trainer import plugins

pytestmark = pytest.mark.parallel

# The sum of two halves is rounded otherwise than the whole: signs of elements near 0, bytes and bfloat16 make more of that.
CLOSE = {"lion": 2e-3, "muon": 2e-3, "adamw8bit": 1e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def dataset(place):
    return tiny_dataset(place / "data", "classify", rows=80)


@pytest.fixture(scope="module")
def ranks(dataset, place):
    run_ranks(optimizer_ranks.main, place)
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", plugins.OPTIMIZERS)
def test_two_ranks_are_one(ranks, dataset, name):
    first, second = (rank["losses"][name] for rank in ranks)
    assert first == second
    assert first == pytest.approx(losses(dataset, name, 8), abs=CLOSE.get(name, 1e-5))
    assert len(first) == 6


@pytest.mark.parametrize("name", sorted(plugins.SHARDABLE))
def test_sharded_steps_are_whole_ones(ranks, name):
    assert max(rank["apart"][name] for rank in ranks) < 1e-6


@pytest.mark.parametrize("name", sorted(set(plugins.OPTIMIZERS) - plugins.SHARDABLE))
def test_what_needs_whole_parameters_is_refused_on_shards(ranks, name):
    for rank in ranks:
        assert f"train.optimizer: {name} needs whole parameters" in rank["refused"][name]


def test_under_a_plan_that_divides_the_model_it_is_the_same(tmp_path):
    words = ("train.max_steps=6", "train.sophia.every=2", "model.qk_norm=true", "model.bigrams=64", "train.layer_decay=0.8",
             'train.groups=[{"match": "norm.*", "lr_scale": 0}]')  # fmt: skip
    plans = {"one": (1,), "zero3": (2, "parallel.zero=3"), "tp2": (2, "parallel.tp=2")}
    found = run_cases(
        tmp_path,
        [
            Case(f"{name}-{plan}", ranks, (*words, f"train.optimizer={name}", *how))
            for name, of in {"muon": ["one", "zero3"], "sophia": ["one", "tp2"], "galore": ["zero3"]}.items()
            for plan, (ranks, *how) in plans.items()
            if plan in of
        ],
    )
    ran = {name: [float.fromhex(loss) for loss in case.get("losses", [])] for name, case in found.items()}
    assert ran["muon-zero3"] == pytest.approx(ran["muon-one"], abs=1e-3)
    assert ran["sophia-tp2"] == pytest.approx(ran["sophia-one"], abs=1e-5)
    assert "train.optimizer: galore needs whole parameters" in found["galore-zero3"]["error"]
