"""The mesh: what each section `parallel` means for a number of ranks, and what is refused with which way out."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from trainer.config import Parallel
from trainer.errors import ConfigError
from trainer.models.experts import Experts
from trainer.parallel.dims import AXES, Dims, check_axes, resolve
from trainer.parallel.experts import Shares

# name -> (keys, ranks, axes that are longer than 1, zero)
MEANT = {
    "nothing said": ({}, 4, {"dp_replicate": 4}, 0),
    "one process": ({}, 1, {}, 0),
    "one process has nothing to share": ({"zero": 3}, 1, {}, 0),
    "zero takes the rest": ({"zero": 3}, 4, {"dp_shard": 4}, 3),
    "zero beside tp": ({"zero": 2, "tp": 2}, 8, {"dp_shard": 4, "tp": 2}, 2),
    "hybrid by replicas": ({"zero": 3, "dp_replicate": 2}, 8, {"dp_replicate": 2, "dp_shard": 4}, 3),
    "hybrid by shards": ({"zero": 1, "dp_shard": 2}, 8, {"dp_replicate": 4, "dp_shard": 2}, 1),
    "both are the rest": ({"zero": 3, "dp_shard": -1}, 4, {"dp_shard": 4}, 3),
    "all given": ({"zero": 3, "dp_replicate": 2, "dp_shard": 2, "tp": 2, "pp": 2}, 16,
                  {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "pp": 2}, 3),
    "zero is shared along cp": ({"zero": 3, "cp": 2, "tp": 2}, 4, {"cp": 2, "tp": 2}, 3),
    "zero takes the rest beside cp": ({"zero": 1, "cp": 2}, 8, {"dp_shard": 4, "cp": 2}, 1),
    "experts lie among the data ranks": ({"ep": 2, "zero": 2}, 4, {"dp_shard": 4}, 2),
    "tp takes all, zero has nothing": ({"zero": 3, "tp": 4}, 4, {"tp": 4}, 0),
}  # fmt: skip
# name -> (keys, ranks, what the message says, what the fix says)
REFUSED = {
    "tp does not divide": (
        {"tp": 4},
        6,
        "parallel: tp 4 does not divide",
        "8 ranks (train.processes=8 on one node), or parallel.tp=3",
    ),
    "too many for one process": ({"tp": 2}, 1, "the number of ranks, 1", "2 ranks"),
    "a product that is short": (
        {"dp_replicate": 2},
        4,
        "parallel: dp_replicate 2 is not the number of ranks, 4",
        "dp_replicate=-1",
    ),
    "the smallest change": ({"tp": 4, "pp": 3}, 8, "tp 4 x pp 3 = 12", "parallel.pp=2"),
    "shards without zero": ({"dp_shard": 2}, 4, "they share nothing", "parallel.zero=3"),
    "experts among too few": ({"ep": 2, "tp": 2}, 2, "among 1 that see different batches", "divides 1"),
    "no ranks": ({"dp_replicate": 0}, 4, "0 ranks", "dp_replicate=1"),
}


@pytest.mark.parametrize("name", MEANT)
def test_what_keys_mean(name):
    keys, ranks, longer, zero = MEANT[name]
    found = resolve(Parallel(**keys), ranks)
    assert {axis: getattr(found, axis) for axis in AXES if getattr(found, axis) > 1} == longer
    assert (found.zero, found.size) == (zero, ranks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_a_way_out(name):
    keys, ranks, message, fix = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        resolve(Parallel(**keys), ranks)
    assert message in caught.value.message
    assert fix in caught.value.hint


def test_whatever_is_accepted_is_a_mesh_of_all_ranks():
    lengths = (-1, 1, 2, 3)
    for zero, replicate, shard, tp, pp, ranks in itertools.product(
        (0, 3), lengths, lengths, (1, 2), (1, 2), range(1, 13)
    ):
        parallel = Parallel(zero=zero, dp_replicate=replicate, dp_shard=shard, tp=tp, pp=pp)
        try:
            found = resolve(parallel, ranks)
        except ConfigError:
            continue
        assert found.size == ranks
        assert found.data * tp * pp == ranks
        assert not zero or replicate < 1 or found.dp_replicate == replicate
        assert (found.zero > 0) == (found.dp_shard > 1)


def test_context_and_expert_parallel_say_why_not():
    with pytest.raises(ConfigError, match="context parallel is for GPUs"):
        check_axes(Dims(cp=2), "cpu", has_experts=False)
    check_axes(Dims(cp=2), "cuda", has_experts=False)
    with pytest.raises(ConfigError, match="no experts"):
        check_axes(Dims(ep=2), "cpu", has_experts=False)
    check_axes(Dims(dp_replicate=2, ep=2), "cpu", has_experts=True)
    for axis in ("pp", "cp", "tp"):
        with pytest.raises(ConfigError, match="experts are divided among ranks that see different batches") as caught:
            check_axes(Dims(dp_replicate=2, ep=2, **{axis: 2}), "cuda", has_experts=True)
        assert f"parallel.{axis}=1" in caught.value.hint


def test_experts_that_keep_statistics_are_refused():
    model = nn.ModuleDict({"mixture": Experts(nn.BatchNorm1d(4) for _ in range(4))})
    shares = Shares.__new__(Shares)
    shares.size, shares.place = 2, 0
    with pytest.raises(ConfigError, match=r"experts of mixture keep a buffer, 0\.running_mean"):
        shares.divide(model)
