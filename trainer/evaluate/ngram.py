"""What a language model has to beat: an interpolated byte n-gram model, and the compressor xz.

The n-gram model is Kneser and Ney's (1995) in its interpolated form (Chen and Goodman 1999) over bytes: a context of
`order` bytes is backed by ever shorter ones, down to a uniform distribution over 256 bytes.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

ORDER = 5
# Closes each document; a byte that UTF-8 text does not use.
SEPARATOR = 0xFF
# Counting needs about 30 bytes of memory for each byte of text; the newest part is taken where there is more.
MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class _Level:
    """Counts of the (k + 1)-grams of one context length k, sorted by context, then by next byte."""

    grams: np.ndarray  # uint64: the bytes of a gram, the last in the lowest eight bits
    counts: np.ndarray  # float64 (grams): occurrences, or for shorter contexts the number of distinct bytes before it
    contexts: np.ndarray  # uint64 (contexts): grams without their last byte
    totals: np.ndarray  # float64 (contexts): sum of the counts
    kinds: np.ndarray  # float64 (contexts): number of distinct next bytes
    discount: float


class ByteNgram:
    """The model, counted on texts.

    Args:
        texts: training documents.
        order: bytes of context, 1 to 7.
    """

    def __init__(self, texts: Sequence[str], order: int = ORDER) -> None:
        self.order = order
        stream = _stream(texts)[-MAX_BYTES:]
        grams, counts = np.unique(_grams(stream, order), return_counts=True)
        self.levels = [_level(grams, counts.astype(np.float64))]
        for length in range(order, 0, -1):
            # Kneser-Ney: a shorter gram counts in how many contexts it occurs, not how often.
            shorter = self.levels[-1].grams & np.uint64((1 << (8 * length)) - 1)
            grams, kinds = np.unique(shorter, return_counts=True)
            self.levels.append(_level(grams, kinds.astype(np.float64)))
        self.levels.reverse()

    def bits(self, texts: Sequence[str]) -> np.ndarray:
        """Bits that each document costs, its end included: float64 (documents)."""
        stream = _stream(texts)
        grams = _grams(stream, self.order)
        # Equal grams cost the same: each distinct one is looked up once, in sorted order, which is quick.
        distinct, place = np.unique(grams, return_inverse=True)
        probability = np.full(len(distinct), 1 / 256)
        for length, level in enumerate(self.levels):
            seen = distinct & np.uint64((1 << (8 * (length + 1))) - 1)
            context, found = _find(level.contexts, seen >> np.uint64(8))
            gram, present = _find(level.grams, seen)
            total = level.totals[context]
            kept = np.where(present, np.maximum(level.counts[gram] - level.discount, 0), 0)
            mixed = (kept + level.discount * level.kinds[context] * probability) / total
            probability = np.where(found, mixed, probability)
        cost = -np.log2(probability)[place]
        ends = np.cumsum([len(text.encode()) + 1 for text in texts])
        return np.add.reduceat(cost, np.concatenate([[0], ends[:-1]])) if len(texts) else np.empty(0)


def xz_bits_per_byte(train: Sequence[str], test: Sequence[str]) -> float:
    """Bits per byte that `xz -9e` needs for the test documents when it has seen the training documents before them."""
    before, after = (b"\n".join(text.encode() for text in texts) for texts in (train, test))
    before = before[-MAX_BYTES:] + b"\n"
    with ThreadPoolExecutor(2) as pool:  # lzma lets other threads run meanwhile
        alone, together = pool.map(_xz, (before, before + after))
    return 8 * (together - alone) / max(len(after), 1)


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _stream(texts: Sequence[str]) -> np.ndarray:
    """The documents' bytes, each followed by the separator: uint8."""
    separator = bytes([SEPARATOR])
    return np.frombuffer(separator.join([*(text.encode() for text in texts), b""]), np.uint8)


def _grams(stream: np.ndarray, order: int) -> np.ndarray:
    """Each byte with the `order` bytes before it (separators before the first), as uint64."""
    padded = np.concatenate([np.full(order, SEPARATOR, np.uint8), stream]).astype(np.uint64)
    grams = np.zeros(len(stream), np.uint64)
    for offset in range(order + 1):
        grams = (grams << np.uint64(8)) | padded[offset : offset + len(stream)]
    return grams


def _level(grams: np.ndarray, counts: np.ndarray) -> _Level:
    contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    # A discount of 1 would leave nothing for grams seen once.
    discount = min(discount, 0.95)
    totals = np.add.reduceat(counts, starts)
    kinds = np.diff(np.append(starts, len(grams))).astype(np.float64)
    return _Level(grams, counts, contexts, totals, kinds, discount)


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each wanted value in a sorted table, and whether it is there."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted
