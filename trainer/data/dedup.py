"""Content hashes for exact duplicates and MinHash bands for near duplicates, over batches of texts at once.

Near duplicates: MinHash over shingles of five words (Broder 1997) by one-permutation hashing with rotation (Shrivastava
and Li 2014), cut into bands (locality-sensitive hashing). In each bucket of equal band keys every row but the one
with the smallest content hash is dropped. The result depends on the set of rows only, not on their order, and needs no
union-find. Words are runs of ASCII letters, digits and `_`, or of non-ASCII bytes, in lower case; signs count only in
texts of fewer than eight words. Rows of different labels are never near duplicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from trainer.data.split import mix

NUM_BINS = 128
SHINGLE = 5
# A text of fewer words is one shingle: all of it, signs included.
SHORT = 8
# Texts of one batch: their arrays stay in the processor's cache.
_BATCH_BYTES = 1 << 17
# More than five words have, as a rule.
_OVERLAP = 1 << 9
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
def _tables() -> tuple[bytes, np.ndarray, np.ndarray]:
    """Table of the bytes that words have, powers of the base and of its inverse modulo 2^64."""
    word = np.zeros(256, np.uint8)
    word[[*range(48, 58), *range(65, 91), *range(97, 123), 95, *range(128, 256)]] = 1
    size = 2 * _BATCH_BYTES

    def powers(base: int) -> np.ndarray:
        table = np.full(size, base, np.uint64)
        table[0] = 1
        return np.cumprod(table, dtype=np.uint64)

    return word.tobytes(), powers(_BASE), powers(pow(_BASE, -1, 2**64))


def band_keys(texts: list[bytes], threshold: float, labels: np.ndarray | None = None) -> np.ndarray:
    """(rows, bands) uint64: two rows that share a key in any column are taken for near duplicates.

    Rows without a word have zeros.

    Args:
        texts: UTF-8.
        threshold: the Jaccard similarity around which rows begin to share a key.
        labels: (rows) uint64, a hash of each row's label; None if there are none.
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
    if labels is not None:
        result[result != 0] ^= np.broadcast_to(labels[:, None], result.shape)[result != 0]
    return result


def _batch_keys(texts: list[bytes], threshold: float) -> np.ndarray:
    if len(texts) == 1 and len(texts[0]) > _BATCH_BYTES:
        shingles = np.concatenate([_shingles([piece])[0] for piece in _pieces(texts[0])])
        owners = np.zeros(len(shingles), np.int64)
    else:
        shingles, owners = _shingles(texts)
    flat = np.full(len(texts) * NUM_BINS, _EMPTY, np.uint64)
    bins = (shingles >> np.uint64(57)).astype(np.int64)
    np.minimum.at(flat, owners * NUM_BINS + bins, shingles & np.uint64(2**57 - 1))
    return _keys(_densify(flat.reshape(-1, NUM_BINS)), threshold)


def _pieces(text: bytes) -> Iterator[bytes]:
    """A long text in pieces of a batch's size, which overlap, so that no shingle is lost between two."""
    for start in range(0, max(len(text) - _OVERLAP, 1), _BATCH_BYTES - _OVERLAP):
        yield text[start : start + _BATCH_BYTES]


def _shingles(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles, and the text that each is in; together the texts have at most twice a batch's bytes."""
    is_word, powers, inverse = _tables()
    joined = b"\n".join(texts) + b"\n"
    # bytes.translate and bytes.lower look bytes up several times as fast as an index array does.
    inside = np.frombuffer(joined.translate(is_word), np.bool_)
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1  # the last byte is a line feed, so that words end
    if inside[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[::2], edges[1::2]
    prefix = np.zeros(len(joined) + 1, np.uint64)
    np.cumsum(np.frombuffer(joined.lower(), np.uint8) * powers[: len(joined)], out=prefix[1:])
    words = mix((prefix[ends] - prefix[starts]) * inverse[starts])

    text_ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
    counts = np.diff(np.searchsorted(starts, text_ends), prepend=0)
    owners = np.repeat(np.arange(len(texts)), counts)
    is_short = counts < SHORT
    inner = (owners[: 1 - SHINGLE] == owners[SHINGLE - 1 :]) & ~is_short[owners[: 1 - SHINGLE]]
    short = np.flatnonzero(is_short & (counts > 0))
    begins = text_ends[short] - 1 - np.fromiter((len(texts[text]) for text in short), np.int64, len(short))
    whole = (prefix[text_ends[short] - 1] - prefix[begins]) * inverse[begins]
    hashes = np.concatenate([_windows(words)[inner], whole])
    return mix(hashes), np.concatenate([owners[: 1 - SHINGLE][inner], short])


def _windows(words: np.ndarray) -> np.ndarray:
    """The polynomial of each run of five words, (words - 4) or none."""
    size = max(len(words) - SHINGLE + 1, 0)
    total = words[:size].copy()
    for step in range(1, SHINGLE):
        total *= np.uint64(_BASE)
        total += words[step : step + size]
    return total


def _densify(bins: np.ndarray) -> np.ndarray:
    """Fill each empty bin from the nearest one before it (circularly), marked with the distance."""
    places = np.arange(NUM_BINS, dtype=np.int16)
    source = np.where(bins != _EMPTY, places, np.int16(-1))
    np.maximum.accumulate(source, axis=1, out=source)
    # Before the first filled bin comes, around the circle, the last one; -1 where a row has none.
    last = source[:, -1:].astype(np.int16)
    source = np.where(source >= 0, source, last)
    distance = (places - source) & np.int16(NUM_BINS - 1)
    values = bins.ravel().take(source + np.arange(len(bins))[:, None] * NUM_BINS, mode="wrap")
    return np.where(last >= 0, values + _marks()[distance], _EMPTY)


@lru_cache
def _marks() -> np.ndarray:
    return np.arange(NUM_BINS).astype(np.uint64) * _OFFSET


@lru_cache
def _order() -> np.ndarray:
    # Bins that lie side by side are filled from the same shingle in short texts: scatter them over the bands.
    return np.argsort(mix(np.arange(1, NUM_BINS + 1).astype(np.uint64)))


def _keys(bins: np.ndarray, threshold: float) -> np.ndarray:
    bands, rows = bands_and_rows(threshold)
    # Band by band, so that all arrays are contiguous.
    chosen = bins.T[_order()[: bands * rows]].reshape(bands, rows, -1)
    key = np.repeat((np.arange(1, bands + 1).astype(np.uint64) * _OFFSET)[:, None], len(bins), axis=1)
    for row in range(rows):
        key = mix(key ^ chosen[:, row]) + np.uint64(_BASE)
    key[:, (bins == _EMPTY).all(axis=1)] = 0
    return key.T


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
