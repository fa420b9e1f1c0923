"""Judging language models: bits per byte of the test documents, perplexity, and lines of code that parse."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.errors import DataError
from trainer.evaluate import codecheck, latency, ngram, score, significance
from trainer.evaluate.subjects import Judged, Subject
from trainer.log import say


def judge_language(params: Params, dataset: Dataset, subjects: Mapping[str, Subject]) -> Judged:
    """Evaluate language models on the test split.

    Raises:
        DataError: the test split is empty.
    """
    split, evaluate = dataset.split("test"), params.evaluate
    texts = split.texts()
    if not texts:
        raise DataError(f"{split.folder}: no documents to test on", "give more data, or a larger data.split.test")
    num_bytes = np.asarray([len(text.encode()) for text in texts], np.float64)
    bits: dict[str, np.ndarray] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        say(f"testing the {name} on {len(texts):,} documents")
        bits[name], tokens = score.document_bits(subject.predictor, texts)
        total = float(bits[name].sum())
        figures[name] = {
            "bits_per_byte": total / float(num_bytes.sum()),
            "perplexity": math.exp(min(total * math.log(2) / tokens, 700.0)),
            "loss": total * math.log(2) / tokens,
            **subject.size(),
        }
    for name in ("candidate", "teacher"):
        inputs = [text[:2000] for text in texts[:256]]
        figures[name] |= latency.measure(subjects[name].folder, inputs, evaluate.latency_runs)
    if evaluate.baseline:
        bits["baseline"], figures["baseline"], figures["xz"] = _baselines(dataset, texts, num_bytes)
    pairs = {"baseline": ("candidate", "baseline"), "student": ("candidate", "student")}
    pairs |= {"teacher": ("candidate", "teacher"), "student_teacher": ("student", "teacher")}
    comparisons = {
        name: significance.compare_bits(
            bits[first], bits[second], num_bytes, evaluate.bootstrap, evaluate.confidence, evaluate.seed
        )
        for name, (first, second) in pairs.items()
        if second in bits
    }
    if evaluate.baseline:
        comparisons["baseline"]["name"] = figures["baseline"]["name"]
    code = codecheck.check(subjects["candidate"].predictor, texts, evaluate.seed)
    if code:
        say("completed lines of code", valid=code["valid"], exact=code["exact"], lines=code["lines"])
    rows = {"id": split.column("id"), "bytes": num_bytes.astype(np.int64).tolist()}
    rows |= {f"bits_{name}": cost.round(4).tolist() for name, cost in bits.items()}
    return Judged("bits_per_byte", figures, comparisons, rows, code)


def _baselines(
    dataset: Dataset, texts: list[str], num_bytes: np.ndarray
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Bits of each document under the n-gram model, its figures, and those of xz."""
    train = dataset.split("train").texts()
    start = time.perf_counter()
    bits = ngram.ByteNgram(train).bits(texts)
    order = ngram.ORDER
    gram = {
        "name": f"byte n-gram of order {order}, interpolated Kneser-Ney",
        "bits_per_byte": float(bits.sum() / num_bytes.sum()),
        "settings": {"context in bytes": order},
        "seconds": round(time.perf_counter() - start, 3),
    }
    say(f"baseline: {gram['name']}", bits_per_byte=gram["bits_per_byte"])
    start = time.perf_counter()
    packed = {
        "name": "xz -9e, after the train split",
        "bits_per_byte": ngram.xz_bits_per_byte(train, texts),
        "seconds": round(time.perf_counter() - start, 3),
    }
    say(f"baseline: {packed['name']}", bits_per_byte=packed["bits_per_byte"])
    return bits, gram, packed
