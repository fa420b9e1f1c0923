"""Content hashes for exact duplicates and MinHash bands for near duplicates, over batches of texts at once.

Near duplicates: MinHash over shingles of five words (Broder 1997) by one-permutation hashing with rotation (Shrivastava
and Li 2014), cut into bands (locality-sensitive hashing). In each bucket of equal band keys every row but the one
with the smallest content hash is dropped. The result depends on the set of rows only, not on their order, and needs no
union-find. Words are runs of ASCII letters, digits and `_`, or of non-ASCII bytes, in lower case.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from trainer.data.split import mix

NUM_BINS = 128
SHINGLE = 5
_BATCH_BYTES = 1 << 18
_BASE = 0x9E3779B97F4A7C15 | 1
_EMPTY = np.uint64(2**64 - 1)
_OFFSET = np.uint64(0xD1B54A32D192ED03)


def content_ids(texts: list[bytes]) -> np.ndarray:
    """(rows, 2) uint64: the first 128 bits of each text's sha256, big-endian."""
    joined = b"".join([hashlib.sha256(text).digest()[:16] for text in texts])
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def hex_ids(ids: np.ndarray) -> list[str]:
    """The ids as 32 hexadecimal digits."""
    raw = ids.astype(">u8").tobytes().hex()
    return [raw[start : start + 32] for start in range(0, len(raw), 32)]


@lru_cache
def bands_and_rows(threshold: float) -> tuple[int, int]:
    """(bands, rows per band) with the smallest sum of false positives and negatives around a Jaccard threshold."""
    similarity = np.linspace(0.0, 1.0, 1001)
    below = similarity < threshold
    best, result = np.inf, (1, 1)
    for bands in range(1, NUM_BINS + 1):
        for rows in range(1, NUM_BINS // bands + 1):
            found = 1.0 - (1.0 - similarity**rows) ** bands
            wrong = float(np.where(below, found, 1.0 - found).sum())
            if wrong < best:
                best, result = wrong, (bands, rows)
    return result


@lru_cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lower-case table, word-byte table, powers of the base and of its inverse modulo 2^64."""
    lower = np.arange(256, dtype=np.uint8)
    lower[65:91] += 32
    word = np.zeros(256, bool)
    word[[*range(48, 58), *range(65, 91), *range(97, 123), 95, *range(128, 256)]] = True
    size = 2 * _BATCH_BYTES

    def powers(base: int) -> np.ndarray:
        table = np.full(size, base, np.uint64)
        table[0] = 1
        return np.cumprod(table, dtype=np.uint64)

    return lower, word, powers(_BASE), powers(pow(_BASE, -1, 2**64))


def band_keys(texts: list[bytes], threshold: float) -> np.ndarray:
    """(rows, bands) uint64: two rows that share a key in any column are taken for near duplicates.

    Rows without a word have zeros.
    """
    bands, _ = bands_and_rows(threshold)
    result = np.zeros((len(texts), bands), np.uint64)
    start = size = 0
    for position, text in enumerate(texts):
        if position > start and size + len(text) > _BATCH_BYTES:
            result[start:position] = _batch_keys(texts[start:position], threshold)
            start, size = position, 0
        size += len(text) + 1
    if start < len(texts):
        result[start:] = _batch_keys(texts[start:], threshold)
    return result


def _batch_keys(texts: list[bytes], threshold: float) -> np.ndarray:
    shingles, owners = _shingles(texts)
    flat = np.full(len(texts) * NUM_BINS, _EMPTY, np.uint64)
    bins = (shingles >> np.uint64(57)).astype(np.int64)
    np.minimum.at(flat, owners * NUM_BINS + bins, shingles & np.uint64(2**57 - 1))
    return _keys(_densify(flat.reshape(-1, NUM_BINS)), threshold)


def _shingles(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles, and the text that each is in. A text of fewer than five words is one shingle."""
    lower, is_word, powers, inverse = _tables()
    joined = np.frombuffer(b"\n".join(texts) + b"\n", np.uint8)
    if len(joined) > len(powers):  # one text longer than a batch: its beginning and end stand for it
        half = len(powers) // 2
        joined = np.concatenate([joined[: half - 1], joined[-half:]])
        lengths = [len(joined) - 1]
    else:
        lengths = [len(text) for text in texts]
    inside = is_word[joined]
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    prefix = np.zeros(len(joined) + 1, np.uint64)
    np.cumsum(lower[joined] * powers[: len(joined)], out=prefix[1:])
    words = mix((prefix[ends] - prefix[starts]) * inverse[starts])

    text_ends = np.cumsum(np.array(lengths, np.int64) + 1)
    counts = np.diff(np.searchsorted(starts, text_ends), prepend=0)
    owners = np.repeat(np.arange(len(lengths)), counts)
    # Pad so that each text can be read five words from each of its words; words past its end count as nothing.
    padded = np.concatenate([words, np.zeros(SHINGLE - 1, np.uint64)])
    padded_owner = np.concatenate([owners, np.full(SHINGLE - 1, -1)])
    total = np.zeros(len(words), np.uint64)
    for step in range(SHINGLE):
        same = padded_owner[step : step + len(words)] == owners
        total = total * np.uint64(_BASE) + np.where(same, padded[step : step + len(words)], np.uint64(0))
    first = np.diff(owners, prepend=-1) != 0
    whole = padded_owner[SHINGLE - 1 : SHINGLE - 1 + len(words)] == owners
    keep = whole | (first & (np.repeat(counts, counts) < SHINGLE))
    return mix(total[keep]), owners[keep]


def _densify(bins: np.ndarray) -> np.ndarray:
    """Fill each empty bin from the nearest one before it (circularly), marked with the distance."""
    filled = bins != _EMPTY
    doubled = np.concatenate([filled, filled], axis=1)
    position = np.where(doubled, np.arange(2 * NUM_BINS), -1)
    source = np.maximum.accumulate(position, axis=1)[:, NUM_BINS:]
    distance = (np.arange(NUM_BINS, 2 * NUM_BINS) - source).astype(np.uint64)
    values = np.take_along_axis(bins, source % NUM_BINS, axis=1)
    return np.where(filled.any(axis=1, keepdims=True), values + distance * _OFFSET, _EMPTY)


@lru_cache
def _order() -> np.ndarray:
    # Bins that lie side by side are filled from the same shingle in short texts: scatter them over the bands.
    return np.argsort(mix(np.arange(1, NUM_BINS + 1).astype(np.uint64)))


def _keys(bins: np.ndarray, threshold: float) -> np.ndarray:
    bands, rows = bands_and_rows(threshold)
    chosen = bins[:, _order()[: bands * rows]].reshape(-1, bands, rows)
    key = np.broadcast_to(np.arange(1, bands + 1).astype(np.uint64) * _OFFSET, chosen.shape[:2]).copy()
    for row in range(rows):
        key = mix(key ^ chosen[:, :, row]) + np.uint64(_BASE)
    key[(bins == _EMPTY).all(axis=1)] = 0
    return key


def non_minimal(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The ids that share a key with a smaller id, sorted and unique.

    Args:
        keys: (entries) uint64 band keys.
        ids: (entries) uint64, the first 64 bits of the rows' content hashes.
    """
    if not len(keys):
        return np.empty(0, np.uint64)
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    smallest = np.repeat(ids[starts], np.diff(np.append(starts, len(keys))))
    return np.unique(ids[ids != smallest])
