"""Checkpoints of tensors that two ranks divide: two real ranks over gloo, and this process alone before and after them."""

from __future__ import annotations

import json

import pytest
import torch

from tests.parallel import shard_ranks
from tests.parallel.shard_ranks import ROWS, whole
from tests.ranks import run_ranks
from trainer.parallel.group import Ranks
from trainer.train.checkpoint import Checkpoints

pytestmark = pytest.mark.parallel

PROPERTIES = ("collectives go on", "the shards come back", "as shards", "generators come back",
              "a rank reads no more than its shards", "of one process", "an error of one rank",
              "nothing half is left")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    with Checkpoints(place / "one", 2, Ranks(), "run") as kept:
        kept.save(20, {"t": whole(20), "step": 20}, {}, durable=True)
    run_ranks(shard_ranks.main, place)
    return place


@pytest.mark.parametrize("what", PROPERTIES)
def test_on_both_ranks(what, place):
    assert [json.loads((place / f"rank-{rank}.json").read_text())[what] for rank in range(2)] == [True, True]


def test_one_process_reads_what_two_have_written(place):
    found, rng = Checkpoints(place / "two", 2, Ranks(), "run").load()
    assert rng is None
    assert found["step"] == 10
    assert all(torch.equal(found["t"][name], value) for name, value in whole(10).items())


def test_each_rank_wrote_its_own_share_and_nothing_twice(place):
    sizes = [path.stat().st_size for path in sorted(place.glob("two/*/*.distcp"))]
    assert len(sizes) == 2
    assert all(abs(size - ROWS * 8) < 20_000 for size in sizes)
