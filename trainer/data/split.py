"""Which split a row falls into: decided by a hash of its content, so that it is the same whatever else the data holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2
_MAX = 2**64 - 1


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection of uint64 that scatters close values."""
    values = values.astype(np.uint64)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def split_hashes(ids: np.ndarray, seed: int) -> np.ndarray:
    """Uniform uint64 per row, independent of the order of ids.

    Args:
        ids: (rows, 2) uint64, the content hashes.
        seed: gives another assignment.
    """
    salt = mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return mix(mix(ids[:, 0] ^ salt) + ids[:, 1])


def uniform_cuts(val: float, test: float) -> tuple[int, int]:
    """(test cut, val cut): a row is test if its hash is below the first, else val if below the second."""
    return min(int(test * 2**64), _MAX), min(int((val + test) * 2**64), _MAX)


def stratified_cuts(
    hashes: np.ndarray, labels: np.ndarray, num_labels: int, val: float, test: float
) -> list[tuple[int, int]]:
    """Cuts of each label, such that it has the same share of its rows in all splits (and at least one in train)."""
    order = np.lexsort((hashes, labels))
    starts = np.searchsorted(labels[order], np.arange(num_labels + 1))
    cuts = []
    for start, end in pairwise(starts):
        own = hashes[order[start:end]]
        num_test = round(test * len(own))
        num_val = min(round(val * len(own)), max(len(own) - num_test - 1, 0))
        # The first hash that no longer belongs is the cut; equal hashes (equal texts) stay together.
        bounds = [int(own[k]) if k < len(own) else _MAX for k in (num_test, num_test + num_val)]
        cuts.append((bounds[0], bounds[1]))
    return cuts


def stratum_of_each(hashes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label by which each row is cut: its own, or for equal texts with several labels, the smallest one of them all.

    Otherwise one text could fall into train by one label and into test by another.
    """
    order = np.lexsort((labels, hashes))
    _, starts, group = np.unique(hashes[order], return_index=True, return_inverse=True)
    result = np.empty_like(labels)
    result[order] = labels[order][starts][group]
    return result


def assign(hashes: np.ndarray, labels: np.ndarray, cuts: list[tuple[int, int]]) -> np.ndarray:
    """The split of each row as int8. `cuts` has one entry for all rows, or one per label."""
    table = np.array(cuts, np.uint64)
    rows = table[labels] if len(table) > 1 else np.broadcast_to(table[0], (len(hashes), 2))
    result = np.full(len(hashes), TRAIN, np.int8)
    result[hashes < rows[:, 1]] = VAL
    result[hashes < rows[:, 0]] = TEST
    return result
