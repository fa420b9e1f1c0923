"""Predictions of a model folder on a test split, through the same `Predictor` that serves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.artifacts.dataset import END, PAD, Split
from trainer.errors import ArtifactError, DataError
from trainer.evaluate.metrics import softmax

if TYPE_CHECKING:
    from trainer.predict import Predictor

BATCH = 64
# Bytes of logits held at once by a language model.
_LOGITS_BYTES = 64_000_000


def label_probabilities(predictor: Predictor, split: Split) -> np.ndarray:
    """Probabilities of each label for the rows of a split, from its texts or pictures: float64 (rows, labels).

    Raises:
        DataError: the split has no rows.
        ArtifactError: the model takes pictures of another shape.
    """
    if not len(split):
        raise DataError(f"{split.folder}: no rows to test on", "give more data, or a larger data.split.test")
    if predictor.spec.task == "image":
        spec = predictor.spec
        shape = (spec.image_channels, spec.image_size, spec.image_size)
        if split.images.shape[1:] != shape:
            raise ArtifactError(
                f"{predictor.folder}: takes pictures of {shape}, the test split has {split.images.shape[1:]}",
                "use the same data.image_size and data.image_channels",
            )
        parts = [
            predictor.logits(np.asarray(split.images[start : start + BATCH], np.float32) / 255)
            for start in range(0, len(split), BATCH)
        ]
        return softmax(np.concatenate(parts))
    return text_probabilities(predictor, split.texts())


def text_probabilities(predictor: Predictor, texts: Sequence[str]) -> np.ndarray:
    """Probabilities of each label for texts: float64 (texts, labels). Texts of like length share a batch."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    probabilities = np.empty((len(texts), len(predictor.labels)))
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        probabilities[index] = softmax(predictor.logits(predictor.encode([texts[i] for i in index])))
    return probabilities


def document_bits(predictor: Predictor, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """Bits that a language model needs for each document, its end included.

    The documents are laid end to end and cut into windows of `max_length` tokens, as in training; every token is
    predicted once, the first from the end of a document before it.

    Returns:
        Bits, float64 (documents), and the number of predicted tokens.
    """
    tokenizer = predictor.tokenizer
    tokenizer.no_truncation()
    rows = [[*each.ids, END] for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    stream = np.asarray([END, *(token for row in rows for token in row)], np.int64)
    bits = np.concatenate(list(_token_bits(predictor, stream)))
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    return np.add.reduceat(bits, starts), len(bits)


def _token_bits(predictor: Predictor, stream: np.ndarray) -> Iterator[np.ndarray]:
    """Bits of each token of a stream but the first, in blocks."""
    width = predictor.spec.max_length
    windows = max(1, _LOGITS_BYTES // (4 * width * predictor.spec.vocab_size))
    for start in range(0, len(stream) - 1, width * windows):
        block = stream[start : start + width * windows + 1]
        count = len(block) - 1
        padded = np.full(-(-count // width) * width, PAD, np.int64)
        padded[:count] = block[:-1]
        logits = predictor.logits(padded.reshape(-1, width)).reshape(len(padded), -1)[:count]
        largest = logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64)) + largest[:, 0]
        yield (total - logits[np.arange(count), block[1:]]) / np.log(2)
