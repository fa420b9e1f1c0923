"""Small but learnable dataset folders for tests, written exactly as `trainer.artifacts.dataset` documents.

    dataset = tiny_dataset(tmp_path / "dataset", "classify", rows=200)

`classify`: each label has words of its own among words that all share. `lm`: lines of a small grammar. `image`: each
label has a pattern of its own under noise. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from trainer.artifacts import manifest
from trainer.artifacts.dataset import END, SPECIAL_TOKENS, SPLITS, Dataset, Spec, spec_meta

IMAGE_SIZE = 8
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def tiny_dataset(
    folder: str | Path,
    task: str = "classify",
    rows: int = 200,
    *,
    num_labels: int = 4,
    noise: float = 0.1,
    max_length: int = 48,
    seed: int = 0,
) -> Dataset:
    """Write and seal a dataset folder of `rows` rows over all splits.

    Args:
        folder: where; it must not exist or be empty.
        task: classify, lm or image.
        rows: number of rows in all splits together.
        num_labels: number of labels (classify, image).
        noise: share of rows whose label is a random one, so that no model is perfect.
        max_length: `Spec.max_length` of classify and lm, tokens.
        seed: another seed gives another dataset of the same kind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, rows, num_labels])
    labels = [f"label-{number}" for number in range(num_labels)] if task != "lm" else []
    if task == "image":
        contents, numbers = _images(random, rows, num_labels, noise)
        texts = [f"{index:05d}.png" for index in range(rows)]
        ids = [
            hashlib.sha256(text.encode() + picture.tobytes()).hexdigest()
            for text, picture in zip(texts, contents, strict=True)
        ]
    else:
        texts, numbers = _texts(random, rows, num_labels, noise) if labels else (_documents(random, rows), [-1] * rows)
        contents = None
        ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    tokenizer = _tokenizer(texts) if task != "image" else None
    bounds = [*np.cumsum([0, *(round(SHARES[split] * rows) for split in SPLITS[:-1])]).tolist(), rows]
    meta = {"rows": {}, "tokens": {}, "bytes": {}}
    for split, first, last in zip(SPLITS, bounds, bounds[1:], strict=False):
        order = sorted(range(first, last), key=lambda index: ids[index])
        place = folder / split
        place.mkdir()
        _write_rows(place, [(ids[i], texts[i], int(numbers[i]), f"tiny:{i + 1}") for i in order])
        meta["rows"][split] = len(order)
        meta["bytes"][split] = 0 if task == "image" else sum(len(texts[i].encode()) for i in order)
        if tokenizer is None:
            np.save(place / "images.npy", contents[order])
        else:
            meta["tokens"][split] = _write_tokens(place, [tokenizer.encode(texts[i]).ids for i in order], task)
        if labels:
            np.save(place / "labels.npy", np.asarray([numbers[i] for i in order], np.int32))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    (folder / "card.md").write_text(f"# A tiny {task} dataset\n", encoding="utf-8")
    spec = (
        Spec(task, num_labels=num_labels, image_size=IMAGE_SIZE, image_channels=1)
        if tokenizer is None
        else Spec(task, vocab_size=tokenizer.get_vocab_size(), num_labels=len(labels), max_length=max_length)
    )
    counts = Counter(numbers)
    meta |= {
        "spec": spec_meta(spec), "task": task, "num_read": rows, "kept": rows, "dropped": {}, "source": f"tiny:{task}",
        "data_version": hashlib.md5("".join(sorted(ids)).encode(), usedforsecurity=False).hexdigest(),
        "labels": {label: counts[number] for number, label in enumerate(labels)},
    }  # fmt: skip
    manifest.seal(folder, "dataset", meta, {})
    return Dataset(folder)


def _texts(random: np.random.Generator, rows: int, num_labels: int, noise: float) -> tuple[list[str], list[int]]:
    """Texts of 6 to 20 words, a third of them words of their label."""
    texts, numbers = [], []
    for row in range(rows):
        number = row % num_labels
        words = [
            f"own{number}{random.integers(8)}" if random.random() < 0.35 else f"word{random.integers(40)}"
            for _ in range(random.integers(6, 20))
        ]
        texts.append(f"{' '.join(words)} {row}")
        numbers.append(int(random.integers(num_labels)) if random.random() < noise else number)
    return texts, numbers


def _documents(random: np.random.Generator, rows: int) -> list[str]:
    """Documents of a few lines of Python."""
    names = ["alpha", "beta", "gamma", "delta"]
    documents = []
    for row in range(rows):
        lines = []
        for _ in range(random.integers(2, 6)):
            name, other = random.choice(names, 2)
            lines.append(f"def {name}({other}):\n    return {other} + {random.integers(3)}\n")
        documents.append("".join(lines) + f"# {row}\n")
    return documents


def _images(random: np.random.Generator, rows: int, num_labels: int, noise: float) -> tuple[np.ndarray, list[int]]:
    patterns = np.random.default_rng(7).integers(0, 200, (num_labels, 1, IMAGE_SIZE, IMAGE_SIZE))
    numbers = np.arange(rows) % num_labels
    pictures = np.clip(patterns[numbers] + random.integers(0, 56, (rows, 1, IMAGE_SIZE, IMAGE_SIZE)), 0, 255)
    wrong = random.random(rows) < noise
    return pictures.astype(np.uint8), np.where(wrong, random.integers(0, num_labels, rows), numbers).tolist()


def _tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write_rows(place: Path, rows: list[tuple[str, str, int, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("label", pa.int32()), ("source", pa.string())])
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    pq.write_table(pa.table(columns, schema=schema), place / "rows.parquet")


def _write_tokens(place: Path, rows: list[list[int]], task: str) -> int:
    """tokens.npy and offsets.npy; returns the number of tokens."""
    rows = [[*row, END] for row in rows] if task == "lm" else rows
    np.save(place / "tokens.npy", np.asarray([token for row in rows for token in row], np.uint16))
    np.save(place / "offsets.npy", np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64))
    return sum(len(row) for row in rows)
