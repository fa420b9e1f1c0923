"""Byte-level BPE (Sennrich et al. 2016; GPT-2's byte alphabet): trained with `tokenizers`, applied with `tiktoken`.

tokenizer.json is the artifact that everyone can read. tiktoken, built from the same merges and the same pattern, gives
the same ids at two to three times the speed, so it encodes the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trainer.artifacts.dataset import SPECIAL_TOKENS
from trainer.errors import DataError

# GPT-2's pattern without its look-ahead, with which tiktoken's regular expressions take twice the time: a run of white
# space is one piece (an indentation is one token), and a single space goes with the word after it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""

# Texts -> an array of uint32 ids for each.
Encode = Callable[[list[str]], Iterator[np.ndarray]]


def train(texts: Iterable[str], vocab_size: int, lowercase: bool = False, prefix_space: bool = False) -> str:
    """Train a tokenizer; returns tokenizer.json. Ids 0 and 1 are SPECIAL_TOKENS, which no text is ever encoded to.

    What is to be done to a text before (lower-casing, a space in front) is part of tokenizer.json, so that every
    reader of it does the same.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    before = [normalizers.Lowercase()] * lowercase + [normalizers.Prepend(" ")] * prefix_space
    if before:
        tokenizer.normalizer = normalizers.Sequence(before)
    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    # Kept in the vocabulary only: as added tokens they would be recognised in a user's text.
    content["added_tokens"] = []
    return json.dumps(content, ensure_ascii=False, indent=1)


def read(path: Path) -> tuple[str, int]:
    """The content of a tokenizer.json of the user's, and its vocabulary size.

    Raises:
        DataError: it is not one, or lacks the special tokens at their ids.
    """
    from tokenizers import Tokenizer

    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data.tokenizer.path: {path}: not a tokenizer.json ({reason})", "pass another file") from None
    for number, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != number:
            message = f"data.tokenizer.path: {path}: token {token} must have id {number}"
            raise DataError(message, "use a tokenizer.json that millrace has made")
    return content, tokenizer.get_vocab_size()


@lru_cache
def _byte_of() -> dict[str, int]:
    """GPT-2's table: the printable character that stands for each byte, reversed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def ranks(content: str) -> dict[bytes, int]:
    """Token bytes -> id of a tokenizer.json that `train` made, without the special tokens."""
    table = _byte_of()
    vocabulary: dict[str, int] = json.loads(content)["model"]["vocab"]
    return {
        bytes(table[character] for character in token): number
        for token, number in vocabulary.items()
        if token not in SPECIAL_TOKENS
    }


def _plain_encoder(content: str) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(texts: list[str]) -> Iterator[np.ndarray]:
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, np.uint32)

    return encode


def _fast_encoder(content: str, threads: int = 1) -> Encode:
    import tiktoken

    mergeable = ranks(content)
    # tiktoken gives its buffer of ids without a Python list only where it looks for special tokens too, and without
    # one of them it looks at every position. This one is never allowed, so it stays plain text where a text has it.
    never = {"\0<|never|>\0": max(mergeable.values()) + 1}
    encoding = tiktoken.Encoding("millrace", pat_str=PATTERN, mergeable_ranks=mergeable, special_tokens=never)

    def one(text: str) -> np.ndarray:
        return encoding.encode_to_numpy(text, disallowed_special=())

    def encode(texts: list[str]) -> Iterator[np.ndarray]:
        if threads == 1:
            yield from map(one, texts)
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(one, texts)

    return encode


def is_ours(content: str) -> bool:
    """Whether tiktoken can stand in for this tokenizer: byte-level BPE as `train` makes it."""
    tree: dict[str, Any] = json.loads(content)
    model, split = tree["model"], tree.get("pre_tokenizer")
    return (
        not tree.get("normalizer") and not tree.get("added_tokens") and not tree.get("post_processor")
        and model.get("type") == "BPE" and not model.get("ignore_merges") and not model.get("dropout")
        and split == _pre_tokenizer()
    )  # fmt: skip


def _pre_tokenizer() -> dict[str, Any]:
    """The pre-tokenizer as `train` writes it."""
    pieces = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [pieces, byte_level]}


def fast_agrees(content: str, texts: list[str]) -> bool:
    """Whether tiktoken gives the same ids as `tokenizers` on some texts."""
    if not is_ours(content):
        return False
    pairs = zip(_fast_encoder(content)(texts), _plain_encoder(content)(texts), strict=True)
    return all(np.array_equal(fast, plain) for fast, plain in pairs)


@lru_cache(maxsize=2)
def _cached(path: str, fast: bool, threads: int, stamp: int) -> Encode:
    content = Path(path).read_text(encoding="utf-8")
    return _fast_encoder(content, threads) if fast else _plain_encoder(content)


def load_encoder(path: Path, fast: bool, threads: int) -> Encode:
    """A function texts -> an array of token ids for each, by tiktoken on some threads if `fast`, else by `tokenizers`."""
    return _cached(str(path), fast, threads, path.stat().st_mtime_ns)
