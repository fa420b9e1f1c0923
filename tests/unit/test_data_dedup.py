"""Duplicates: content hashes, MinHash bands, and what is dropped in a bucket."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import dedup

WORDS = [f"w{number}" for number in range(3000)]


def document(seed: int, length: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def keys(*texts: str) -> np.ndarray:
    return dedup.band_keys([text.encode() for text in texts], 0.8)


def share_a_band(left: str, right: str) -> bool:
    found = keys(left, right)
    return bool((found[0] == found[1]).any())


def jaccard(left: list[str], right: list[str]) -> float:
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (left, right))
    return len(a & b) / len(a | b)


@given(st.lists(st.binary(max_size=20), max_size=20), st.integers(0, 2**32))
def test_ids_follow_the_content(texts: list[bytes], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(texts))
    ids = dedup.content_ids(texts)
    assert np.array_equal(dedup.content_ids([texts[i] for i in order]), ids[order])
    assert len({tuple(row) for row in ids.tolist()}) == len(set(texts))


def test_hex_ids_sort_like_the_numbers() -> None:
    ids = np.random.default_rng(0).integers(0, 2**64, (500, 2), dtype=np.uint64)
    by_number = ids[np.lexsort((ids[:, 1], ids[:, 0]))]
    names = dedup.hex_ids(by_number)
    assert names == sorted(names)
    assert all(len(name) == 32 for name in names)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12), st.integers(0, 2**32))
def test_keys_of_a_text_do_not_depend_on_its_neighbours(texts: list[str], seed: int) -> None:
    encoded = [text.encode(errors="replace") for text in texts]
    order = np.random.default_rng(seed).permutation(len(texts))
    together = dedup.band_keys(encoded, 0.8)
    assert np.array_equal(dedup.band_keys([encoded[i] for i in order], 0.8), together[order])
    assert np.array_equal(np.concatenate([dedup.band_keys([text], 0.8) for text in encoded]), together)


def test_keys_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(document(seed, 40)).encode() for seed in range(200)]
    whole = dedup.band_keys(texts, 0.8)
    monkeypatch.setattr(dedup, "_BATCH_BYTES", 700)
    assert np.array_equal(dedup.band_keys(texts, 0.8), whole)


def test_case_and_punctuation_make_no_difference() -> None:
    left = "The quick brown fox jumps over the lazy dog; again and again."
    assert np.array_equal(keys(left)[0], keys("the QUICK, brown fox (jumps) over the lazy dog again AND again")[0])


def test_texts_without_words_have_no_keys() -> None:
    assert not keys("!!! ... ---", "", "\n").any()


@pytest.mark.parametrize("length", [6, 20, 100, 400, 3000])
def test_near_duplicates_are_found_and_others_are_not(length: int) -> None:
    found = unrelated = 0
    for seed in range(60):
        words = document(seed, length)
        changed = (
            [*words[:-1], "changed"] if length < 100 else [*words[: length // 2], "changed", *words[length // 2 :]]
        )
        assert length < 20 or jaccard(words, changed) > 0.85
        found += share_a_band(" ".join(words), " ".join(changed))
        unrelated += share_a_band(" ".join(words), " ".join(document(seed + 1000, length)))
    assert unrelated == 0
    # At a similarity of 0.88 (20 words, one changed) the bands find 85 %, above 0.93 more than 97 %.
    assert found >= {6: 0, 20: 42}.get(length, 56)


def test_half_equal_texts_are_not_near_duplicates() -> None:
    wrong = 0
    for seed in range(200):
        words = document(seed, 120)
        other = [*words[:80], *document(seed + 5000, 40)]
        assert 0.4 < jaccard(words, other) < 0.6
        wrong += share_a_band(" ".join(words), " ".join(other))
    assert wrong <= 4


def test_short_texts_that_differ_in_a_word_stay() -> None:
    assert not share_a_band("Python library for reading mail", "Python library for reading news")


def test_a_text_longer_than_a_batch_is_read_to_its_end() -> None:
    words = document(0, 200_000)
    text = " ".join(words)
    assert len(text) > 5 * dedup._BATCH_BYTES
    assert share_a_band(text, text + " end")
    assert not share_a_band(text, " ".join(document(1, 200_000)))
    other = document(1, 200_000)
    for begin in range(0, 200_000, 50_000):
        changed = [*words[:begin], *other[begin : begin + 80_000], *words[begin + 80_000 :]]
        assert not share_a_band(text, " ".join(changed)), begin


def test_pieces_of_a_long_text_hold_every_shingle() -> None:
    text = " ".join(document(0, 60_000)).encode()
    pieces = list(dedup._pieces(text))
    assert len(pieces) > 2
    assert all(len(piece) <= dedup._BATCH_BYTES for piece in pieces)
    assert pieces[0][:-512] + b"".join(piece[: -dedup._OVERLAP] for piece in pieces[1:-1]) + pieces[-1] == text


def test_signs_tell_short_texts_apart() -> None:
    different = ["C", "C++", "C#", "a > b", "a < b", "f(x)", "f[x]", "return ' '", "return ''", "x = 1 if a > b else 0"]
    for first, second in itertools.combinations(different, 2):
        assert not share_a_band(first, second), (first, second)
    assert share_a_band("Good Product", "good product")


def test_rows_of_other_labels_are_no_near_duplicates() -> None:
    text = " ".join(document(0, 100)).encode()
    labels = np.array([7, 7, 9], np.uint64)
    keys = dedup.band_keys([text, text + b" end", text], 0.8, labels)
    assert (keys[0] == keys[1]).any()
    assert not np.isin(keys[2], keys[:2]).any()
    assert not dedup.band_keys([b"..."], 0.8, labels[:1]).any()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), max_size=40), st.integers(0, 2**32))
def test_all_but_the_smallest_of_a_bucket_go_in_any_order(pairs: list[tuple[int, int]], seed: int) -> None:
    table = np.array(pairs, np.uint64).reshape(-1, 2)
    order = np.random.default_rng(seed).permutation(len(table))
    dropped = dedup.non_minimal(table[:, 0], table[:, 1])
    assert np.array_equal(dedup.non_minimal(table[order, 0], table[order, 1]), dropped)
    buckets: dict[int, set[int]] = {}
    for key, row in pairs:
        buckets.setdefault(key, set()).add(row)
    assert set(dropped.tolist()) == {row for rows in buckets.values() for row in rows if row != min(rows)}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_turn_at_the_threshold(threshold: float) -> None:
    bands, rows = dedup.bands_and_rows(threshold)
    assert bands * rows <= dedup.NUM_BINS
    assert abs((1 / bands) ** (1 / rows) - threshold) < 0.08
