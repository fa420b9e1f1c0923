"""Dropout under tensor parallel: alike where ranks hold the same, each its own where each has a part, recomputed the same."""

from __future__ import annotations

import json

import pytest

from tests.parallel import dropout_ranks
from tests.parallel.dropout_ranks import CASES, FAMILIES
from tests.ranks import run_ranks
from tests.tiny import tiny_dataset

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    place = tmp_path_factory.mktemp("dropout")
    for family, words in FAMILIES.items():
        tiny_dataset(place / family, words[0].split("=")[1], rows=40, max_length=16)
    run_ranks(dropout_ranks.main, place)
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_what_all_ranks_hold_stays_the_same(ranks, case):
    one, other = (found[case] for found in ranks)
    for what in ("embedded", "left", "whole", "state"):
        assert one[what] == other[what], what
    assert one["embedded"]


@pytest.mark.parametrize("case", CASES)
def test_masks_of_the_residual_stream_are_alike_unless_it_is_divided(ranks, case):
    one, other = (found[case]["dropped"] for found in ranks)
    assert len(set(one)) == 4  # two in each block, whether drawn once or again
    assert all((a == b) == ("sequence" not in case) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("encoder")])
def test_heads_of_different_ranks_have_masks_of_their_own(ranks, case):
    assert ranks[0][case]["attended"] != ranks[1][case]["attended"]


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("recomputed")])
def test_recomputed_masks_are_those_of_the_first_time(ranks, case):
    for found in ranks:
        assert found[case]["own"] == found[f"{case} recomputed"]["own"]
