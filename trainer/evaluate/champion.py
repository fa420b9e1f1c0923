"""The champion of the registry, and how the candidate compares with it on the champion's own test set."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.artifacts.dataset import Dataset, Split
from trainer.config import Params
from trainer.evaluate import score, significance
from trainer.evaluate.metrics import macro_f1_samples
from trainer.log import say
from trainer.predict import Predictor
from trainer.registry import Registry

_WORD = re.compile(r"\w+")


def compare(params: Params, dataset: Dataset, candidate: Path, digest: str, cache: Path) -> dict[str, Any] | None:
    """Compare a candidate with the champion of `promote.registry`.

    Rows of the champion's test set that stand in the candidate's own train or val split, however they were cleaned, are
    left out: it has seen them.

    Args:
        params: sections `promote` and `evaluate`.
        dataset: the candidate's dataset.
        candidate: its model folder.
        digest: its artifact digest.
        cache: folder for a copy, where the registry is remote.

    Returns:
        None if there is no champion. Else `version`, `digest` and, unless the candidate is the champion, either
        `incomparable` (a reason) or the comparison of `trainer.evaluate.significance`, with `candidate` and `champion`
        (their figures on that set), `rows` and `left_out`.
    """
    registry = Registry(params.promote.registry)
    champion = registry.champion(params.promote.model)
    if champion is None:
        return None
    found: dict[str, Any] = {"version": champion.version, "digest": champion.digest}
    if champion.digest == digest:
        return found
    say(f"comparing with champion {champion.version} on its own test set")
    model = registry.fetch(params.promote.model, champion.version, "model", cache)
    kept = Dataset(registry.fetch(params.promote.model, champion.version, "test", cache / "test"))
    theirs, ours = Predictor(model), Predictor(candidate)
    if theirs.spec.task != ours.spec.task:
        return {**found, "incomparable": f"its task is {theirs.spec.task}, the candidate's is {ours.spec.task}"}
    shapes = [(each.spec.image_channels, each.spec.image_size) for each in (theirs, ours)]
    if shapes[0] != shapes[1]:
        return {**found, "incomparable": f"it takes pictures of another shape, {shapes[0]} instead of {shapes[1]}"}
    split = kept.split("test")
    unseen = _unseen(kept, split, dataset)
    found["left_out"] = int((~unseen).sum())
    if not unseen.any():
        return {**found, "incomparable": "the candidate was trained on every row of its test set"}
    if ours.spec.task == "lm":
        return found | _compare_documents(params, ours, theirs, split, unseen)
    return found | _compare_labels(params, ours, theirs, kept, split, unseen)


def _compare_labels(
    params: Params, ours: Predictor, theirs: Predictor, kept: Dataset, split: Split, unseen: np.ndarray
) -> dict[str, Any]:
    """Labels are matched by name: both models, and the test set, may know different ones."""
    names = list(dict.fromkeys([*kept.labels, *theirs.labels, *ours.labels]))
    number = {name: i for i, name in enumerate(names)}
    actual = np.asarray([number[kept.labels[i]] for i in split.labels])[unseen]
    predicted = []
    for model in (ours, theirs):
        own = np.asarray([number[name] for name in model.labels])
        predicted.append(own[score.label_probabilities(model, split).argmax(axis=1)][unseen])
    evaluate = params.evaluate
    comparison = significance.compare_labels(
        actual, predicted[0], predicted[1], len(names), evaluate.bootstrap, evaluate.confidence, evaluate.seed
    )
    once = np.ones((1, len(actual)))
    for who, labels in zip(("candidate", "champion"), predicted, strict=True):
        macro = macro_f1_samples(actual, labels, once, len(names)).item()
        comparison[who] = {"accuracy": float((labels == actual).mean()), "macro_f1": macro}
    return comparison


def _compare_documents(
    params: Params, ours: Predictor, theirs: Predictor, split: Split, unseen: np.ndarray
) -> dict[str, Any]:
    texts = [text for text, keep in zip(split.texts(), unseen, strict=True) if keep]
    num_bytes = np.asarray([len(text.encode()) for text in texts], np.float64)
    bits = [score.document_bits(model, texts)[0] for model in (ours, theirs)]
    evaluate = params.evaluate
    comparison = significance.compare_bits(
        bits[0], bits[1], num_bytes, evaluate.bootstrap, evaluate.confidence, evaluate.seed
    )
    for who, cost in zip(("candidate", "champion"), bits, strict=True):
        comparison[who] = {"bits_per_byte": float(cost.sum() / num_bytes.sum())}
    return comparison


def _unseen(kept: Dataset, split: Split, dataset: Dataset) -> np.ndarray:
    """Which rows of a split of `kept` are in neither the train nor the val split of a dataset: bool (rows).

    Content hashes are of cleaned texts, and so change with every `data.clean` key. A row is therefore also known by its
    place in the raw data, where both datasets were made of the same version of it, and by its words.
    """
    version = kept.meta.get("data_version")
    same_raw = bool(version) and version == dataset.meta.get("data_version")
    seen: set[bytes] = set()
    for name in ("train", "val"):
        seen.update(key for keys in _keys(dataset.split(name), dataset.spec.task, same_raw) for key in keys)
    return np.asarray([seen.isdisjoint(keys) for keys in _keys(split, kept.spec.task, same_raw)], bool)


def _keys(split: Split, task: str, same_raw: bool) -> Iterator[tuple[bytes, ...]]:
    """By what each row can be known again."""
    sources = split.column("source") if same_raw else [""] * len(split)
    # The text of a picture is its file's name.
    texts = split.texts() if task != "image" else [""] * len(split)
    for row, text, source in zip(split.column("id"), texts, sources, strict=True):
        words = "".join(_WORD.findall(unicodedata.normalize("NFC", text).lower()))
        yield tuple(
            hashlib.blake2b(f"{kind}:{key}".encode(), digest_size=16).digest()
            for kind, key in (("id", row), ("words", words), ("source", source))
            if key
        )
