"""The tokenizer: `tokenizers` and tiktoken agree id for id, texts come back, and no text becomes a special token."""

from __future__ import annotations

import json
import random
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.artifacts.dataset import SPECIAL_TOKENS
from trainer.data import tokenizer
from trainer.errors import DataError


@lru_cache
def corpus() -> tuple[str, ...]:
    """Some modules of the standard library, and text of many scripts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [(root / f"{name}.py").read_text() for name in ("argparse", "ast", "bdb", "calendar", "cmd", "dis")]
    scripts = [
        "Привет, мир! Как дела? ",
        "日本語のテキスト、漢字とかな。",
        "العربية ١٢٣ ",
        "Ελληνικά ½ ²  ",
        "한국어 👩‍👩‍👧 emoji",
    ]
    return (*modules, *(script * 40 for script in scripts))


@lru_cache
def trained() -> str:
    return tokenizer.train(corpus(), 2000)


@lru_cache
def encoders() -> tuple[tokenizer.Encode, tokenizer.Encode]:
    return tokenizer._fast_encoder(trained()), tokenizer._plain_encoder(trained())


def assert_agree(texts: list[str]) -> None:
    fast, plain = (list(encode(texts)) for encode in encoders())
    for text, left, right in zip(texts, fast, plain, strict=True):
        assert left.tolist() == right.tolist(), text


def test_both_agree_on_other_modules_than_it_was_trained_on() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.glob("[a-p]*.py") if path.stat().st_size < 60_000)
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert len(texts) > 60
    assert_agree(texts)


def test_both_agree_on_pieces_cut_anywhere() -> None:
    draw = random.Random(0)
    whole = "".join(corpus())
    starts = [draw.randrange(len(whole)) for _ in range(3000)]
    assert_agree([whole[start : start + draw.randrange(60)] for start in starts])


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=40), max_size=5))
def test_both_agree_on_any_text_and_it_comes_back(texts: list[str]) -> None:
    from tokenizers import Tokenizer

    assert_agree(texts)
    reader = Tokenizer.from_str(trained())
    for text, ids in zip(texts, encoders()[0](texts), strict=True):
        assert reader.decode(ids.tolist(), skip_special_tokens=False) == text


@given(st.text(alphabet="'’ \t\n\r\x0b\x85\u00a0\u2028sdtlverm1²½A_-(", max_size=24))
def test_both_agree_where_the_pattern_is_delicate(text: str) -> None:
    assert_agree([text])


def test_special_tokens_in_a_text_are_just_text() -> None:
    text = f"a{SPECIAL_TOKENS[0]}b{SPECIAL_TOKENS[1]}"
    for encode in encoders():
        (ids,) = encode([text])
        assert not np.isin(ids, [0, 1]).any()


def test_special_tokens_have_their_ids() -> None:
    vocabulary = json.loads(trained())["model"]["vocab"]
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1]
    assert sorted(vocabulary.values()) == list(range(2000))


def test_training_is_the_same_each_time_and_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert tokenizer.train(corpus(), 2000) == trained()


def test_every_byte_can_be_encoded_when_trained_on_next_to_nothing() -> None:
    content = tokenizer.train(["a"], 300)
    text = "".join(map(chr, range(0x250))) + "漢👍"
    fast, plain = tokenizer._fast_encoder(content), tokenizer._plain_encoder(content)
    assert next(fast([text])).tolist() == next(plain([text])).tolist()
    assert len(set(tokenizer.ranks(content).values())) == 256


CHANGES = {
    "normalizer": {"normalizer": {"type": "Lowercase"}},
    "GPT-2's pattern": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}},
    "whitespace": {"pre_tokenizer": {"type": "Whitespace"}},
    "no pre-tokenizer": {"pre_tokenizer": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_tiktoken_does_not_stand_in_for_other_tokenizers(name: str) -> None:
    assert tokenizer.fast_agrees(trained(), ["a text"])
    assert not tokenizer.is_ours(json.dumps({**json.loads(trained()), **CHANGES[name]}))


def test_disagreement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    monkeypatch.setattr(tokenizer, "is_ours", lambda content: True)
    monkeypatch.setattr(tokenizer, "PATTERN", r"\S+|\s+")
    assert not tokenizer.fast_agrees(trained(), ["a text, with words"])


BROKEN = {"not JSON": "x", "not a tokenizer": "{}", "no special tokens": ""}


@pytest.mark.parametrize("name", BROKEN)
def test_a_users_tokenizer_is_checked(name: str, tmp_path: Path) -> None:
    content = BROKEN[name] or trained().replace(SPECIAL_TOKENS[1], "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"data\.tokenizer\.path"):
        tokenizer.read(tmp_path / "tokenizer.json")


def test_a_word_has_the_same_tokens_wherever_it_stands_and_however_it_is_written() -> None:
    from tokenizers import Tokenizer

    folded = tokenizer.train(corpus(), 600, lowercase=True, prefix_space=True)
    first, last, shouted, empty = tokenizer._plain_encoder(folded)(["return", "a return", "RETURN", ""])
    assert Tokenizer.from_str(folded).decode(list(first)) == " return"
    assert list(first) == list(shouted) == list(last)[-len(first) :]
    assert len(empty) == 0
    plain, shouted = tokenizer._plain_encoder(tokenizer.train(corpus(), 600))(["return", "RETURN"])
    assert list(plain) != list(shouted)
    assert not tokenizer.fast_agrees(folded, ["Return"])
