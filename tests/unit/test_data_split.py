"""Splits: by content, independent of order, of the other rows and of the ids' own order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.split import TEST, TRAIN, VAL, assign, split_hashes, stratified_cuts, uniform_cuts

IDS = np.random.default_rng(0).integers(0, 2**64, (20_000, 2), dtype=np.uint64)
shares = st.floats(0, 0.45)


@given(st.integers(0, 2**40), shares, shares, st.integers(0, 2**32))
def test_assignment_follows_the_row_not_its_place(seed: int, val: float, test: float, shuffle: int) -> None:
    ids = IDS[:500]
    cuts = [uniform_cuts(val, test)]
    labels = np.zeros(len(ids), np.int32)
    order = np.random.default_rng(shuffle).permutation(len(ids))
    straight = assign(split_hashes(ids, seed), labels, cuts)
    assert np.array_equal(assign(split_hashes(ids[order], seed), labels, cuts), straight[order])


def test_shares_are_met_even_for_the_rows_with_the_smallest_ids() -> None:
    # data.max_rows takes the rows with the smallest content hashes: the splits must not depend on that.
    smallest = IDS[np.lexsort((IDS[:, 1], IDS[:, 0]))][:5000]
    where = assign(split_hashes(smallest, 0), np.zeros(5000, np.int32), [uniform_cuts(0.1, 0.2)])
    shares_found = np.bincount(where, minlength=3) / 5000
    assert np.allclose(shares_found, [0.7, 0.1, 0.2], atol=0.02)


def test_seeds_give_independent_assignments() -> None:
    labels = np.zeros(len(IDS), np.int32)
    first, second = (assign(split_hashes(IDS, seed), labels, [uniform_cuts(0.25, 0.25)]) for seed in (0, 1))
    # Independent: 0.5 * 0.5 + 0.25 * 0.25 * 2 of the rows agree by chance.
    assert abs((first == second).mean() - 0.375) < 0.02


def test_zero_shares_give_empty_splits() -> None:
    where = assign(split_hashes(IDS, 0), np.zeros(len(IDS), np.int32), [uniform_cuts(0.0, 0.0)])
    assert (where == TRAIN).all()


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), shares, shares, st.integers(0, 99))
def test_stratified_split_has_each_labels_share(sizes: list[int], val: float, test: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    hashes = split_hashes(IDS[: len(labels)], seed)
    where = assign(hashes, labels, stratified_cuts(hashes, labels, len(sizes), val, test))
    for label, size in enumerate(sizes):
        found = np.bincount(where[labels == label], minlength=3)
        assert found[TEST] == round(test * size)
        assert found[VAL] == min(round(val * size), max(size - round(test * size) - 1, 0))
        assert found[TRAIN] >= 1 or round(test * size) == size


def test_stratified_split_keeps_equal_texts_together() -> None:
    ids = np.repeat(IDS[:40], 5, axis=0)
    labels = np.zeros(len(ids), np.int32)
    hashes = split_hashes(ids, 0)
    where = assign(hashes, labels, stratified_cuts(hashes, labels, 1, 0.33, 0.33)).reshape(40, 5)
    assert (where == where[:, :1]).all()
