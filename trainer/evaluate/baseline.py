"""What a model has to beat: simple methods that need no tuning by hand, fitted on the same train split.

Texts: TF-IDF of words and word pairs with logistic regression, its strength C chosen on the validation split.
Pictures: logistic regression on pixels. Both: always the most frequent label.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.artifacts.dataset import Dataset, Split
from trainer.log import say

# The grids reach from too weak to too strong: on the data of the presets the best value lies inside or gains < 0.003.
TEXT_GRID = (4.0, 16.0, 64.0)
IMAGE_GRID = (0.01, 0.1, 1.0)
MAX_FEATURES = 200_000
# More rows than this would take minutes; the name of the baseline says how many were used.
MAX_ROWS = 60_000
# Texts are cut off at this many characters, far above the 512 tokens that a model sees by default.
MAX_CHARS = 20_000


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline.

    Attributes:
        name: what it is, for people.
        probabilities: float64 (test rows, labels).
        seconds: wall time of fitting and predicting.
        settings: what was chosen, and on what score.
    """

    name: str
    probabilities: np.ndarray
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


def most_frequent(dataset: Dataset) -> Baseline:
    """Always the label that most training rows have, with the labels' frequencies as probabilities."""
    start = time.perf_counter()
    counts = np.bincount(dataset.split("train").labels, minlength=dataset.spec.num_labels).astype(np.float64)
    rows = len(dataset.split("test"))
    label = dataset.labels[int(counts.argmax())]
    return Baseline("most frequent label", np.tile(counts / counts.sum(), (rows, 1)), _since(start), {"label": label})


def tfidf(dataset: Dataset) -> Baseline:
    """TF-IDF of words and word pairs (sublinear counts), logistic regression one label against the rest."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    train, val, test = (dataset.split(name) for name in ("train", "val", "test"))
    index = _sample(len(train))
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=MAX_FEATURES, dtype=np.float64)
    texts = train.texts()
    try:
        features = vectorizer.fit_transform(texts[i][:MAX_CHARS] for i in index)
    except ValueError:  # not one word in all texts: single characters are what there is
        vectorizer = TfidfVectorizer(analyzer="char", sublinear_tf=True, max_features=MAX_FEATURES, dtype=np.float64)
        features = vectorizer.fit_transform(texts[i][:MAX_CHARS] for i in index)
    others = [vectorizer.transform(text[:MAX_CHARS] for text in split.texts()) for split in (val, test)]
    # liblinear's dual solver takes seconds here where the multinomial one takes minutes, and is no less accurate.
    name = "TF-IDF (words, pairs) + logistic regression"
    return _tuned(
        name,
        start,
        TEXT_GRID,
        lambda c: LogisticRegression(solver="liblinear", dual=True, C=c, tol=0.1, random_state=0),
        (features, *others),
        (np.asarray(train.labels)[index], np.asarray(val.labels)),
        dataset.spec.num_labels,
    )


def pixels(dataset: Dataset) -> Baseline:
    """Logistic regression on pixels."""
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    train, val, test = (dataset.split(name) for name in ("train", "val", "test"))
    index = _sample(len(train))
    features = (_flat(train)[index], _flat(val), _flat(test))
    return _tuned(
        "logistic regression on pixels",
        start,
        IMAGE_GRID,
        lambda c: LogisticRegression(C=c, max_iter=300),
        features,
        (np.asarray(train.labels)[index], np.asarray(val.labels)),
        dataset.spec.num_labels,
    )


def label_baselines(dataset: Dataset) -> list[Baseline]:
    """The baselines of a dataset with labels; the first is the one to beat."""
    strong = (tfidf if dataset.spec.task == "classify" else pixels)(dataset)
    return [strong, most_frequent(dataset)]


def _tuned(
    name: str,
    start: float,
    grid: Iterable[float],
    make: Any,
    features: tuple[Any, Any, Any],
    labels: tuple[np.ndarray, np.ndarray],
    num_labels: int,
) -> Baseline:
    """The model whose C has the highest accuracy on the validation rows (the smallest C of equals)."""
    from sklearn.multiclass import OneVsRestClassifier

    (train, val, test), (actual, val_actual) = features, labels
    scores: dict[str, float] = {}
    best: tuple[float, Any] | None = None
    known = np.unique(actual)
    if len(known) < 2:
        probabilities = np.zeros((test.shape[0], num_labels))
        probabilities[:, known] = 1.0
        return Baseline(name, probabilities, _since(start), {"labels in train": 1})
    for c in grid:
        model = OneVsRestClassifier(make(c))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "did not converge" at a strength that another one beats
            model.fit(train, actual)
        scores[f"{c:g}"] = float((model.predict(val) == val_actual).mean()) if len(val_actual) else 0.0
        say(f"baseline: C {c:g}, validation accuracy {scores[f'{c:g}']:.4f}")
        if best is None or scores[f"{c:g}"] > best[0]:
            best = (scores[f"{c:g}"], model)
    assert best is not None
    probabilities = np.zeros((test.shape[0], num_labels))
    probabilities[:, known] = best[1].predict_proba(test)
    rows = f", {train.shape[0]:,} training rows" if train.shape[0] >= MAX_ROWS else ""
    chosen = f"{best[1].estimator.C:g}"
    return Baseline(name + rows, probabilities, _since(start), {"C": chosen, "val_accuracy": scores})


def _sample(rows: int) -> np.ndarray:
    """At most MAX_ROWS row numbers, the same in every run."""
    if rows <= MAX_ROWS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, MAX_ROWS, replace=False))


def _flat(split: Split) -> np.ndarray:
    images = np.asarray(split.images)
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _since(start: float) -> float:
    return time.perf_counter() - start
