"""Stratified cross-validation of a training recipe: how good it is, whatever the luck of one split (Stone 1974)."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from trainer import models, tasks
from trainer.artifacts.dataset import SPLITS, Dataset, Split
from trainer.config import Params
from trainer.config.load import validate
from trainer.config.train_parts import EarlyStopping
from trainer.cores import num_cores
from trainer.errors import ConfigError, DataError
from trainer.train.fit import fit
from trainer.train.state import seed_all


def cross_validate(params: Params, dataset: Dataset, folds: int, workers: int = 0) -> list[float]:
    """Train `folds` models, each on all rows but one fold, and measure each on that fold.

    All splits of the dataset are put together and divided anew. The weights after the last step are measured: the fold
    has no part in choosing them, so the figure is not flattered. Each fold is trained on one CPU thread, so the figures
    do not depend on how many run at a time.

    Args:
        params: the recipe; `train.seed` also divides the folds.
        dataset: of a task with labels.
        folds: number of folds, at least 2.
        workers: folds to train at a time, each in a process; 0 takes one per core, 1 stays in this process.

    Returns:
        The accuracy of each fold.

    Raises:
        ConfigError: the task has no labels, or there are fewer than 2 folds.
        DataError: there are fewer rows than folds.
    """
    if dataset.spec.task == "lm" or folds < 2:
        raise ConfigError(
            f"evaluate.folds: {folds} folds of task {dataset.spec.task}: needs labels and at least 2 folds",
            "use evaluate.folds=0",
        )
    stratified(np.asarray(merge(dataset).labels), folds, params.train.seed)
    workers = min(folds, workers or num_cores())
    if workers == 1 or params.train.device == "cuda":
        return [_fold(params, dataset, folds, fold) for fold in range(folds)]
    # Fresh processes: a fork would inherit locks of torch's threads.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        plain, place = params.model_dump(mode="json"), str(dataset.folder)
        return list(pool.map(_fold_of, [plain] * folds, [place] * folds, [folds] * folds, range(folds)))


def _fold_of(plain: dict[str, Any], place: str, folds: int, fold: int) -> float:
    return _fold(validate(plain), Dataset(place), folds, fold)


def _fold(params: Params, dataset: Dataset, folds: int, fold: int) -> float:
    """Accuracy on one fold of a model trained on the others."""
    # Evaluations on the way would choose nothing and cost time.
    changes = {"processes": 1, "threads": 1, "eval_every": 10**9, "early_stopping": EarlyStopping()}
    recipe = params.model_copy(update={"train": params.train.model_copy(update=changes)})
    merged = merge(dataset)
    held_out = stratified(np.asarray(merged.labels), folds, params.train.seed)[fold]
    kept = np.setdiff1d(np.arange(len(merged)), held_out)
    task = tasks.build(recipe, _Folded(dataset, {"train": take(merged, kept), "val": take(merged, held_out)}))
    seed_all(params.train.seed)
    fitted = fit(recipe, task, models.build(params.model, dataset.spec), what=f"fold {fold + 1}")
    return fitted.metrics["val_accuracy"]


class _Folded(Dataset):
    """A dataset whose splits are given."""

    def __init__(self, dataset: Dataset, splits: dict[str, Split]) -> None:
        self.__dict__.update(copy.copy(dataset.__dict__))
        self._given = splits

    def split(self, name: str) -> Split:
        """One of the given splits."""
        return self._given[name]


def merge(dataset: Dataset) -> Split:
    """All splits of a dataset as one, in memory."""
    parts = [part for part in (dataset.split(name) for name in SPLITS) if len(part)]
    tokens = np.concatenate([np.asarray(part.tokens) for part in parts])
    ends = [np.diff(np.asarray(part.offsets)) for part in parts if part.offsets.size]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(ends))]) if ends else np.empty(0, np.int64)
    images = [np.asarray(part.images) for part in parts if part.images.size]
    return Split(
        "all",
        dataset.folder,
        tokens,
        offsets.astype(np.int64),
        np.concatenate([np.asarray(part.labels) for part in parts]),
        np.concatenate(images) if images else np.empty(0, np.uint8),
    )


def take(split: Split, index: np.ndarray) -> Split:
    """The rows of a split at `index`."""
    if split.images.size:
        return replace(split, labels=split.labels[index], images=split.images[index])
    rows = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for i in index]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return replace(split, tokens=np.concatenate(rows), offsets=offsets, labels=split.labels[index])


def stratified(labels: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each fold: every label is spread over the folds as evenly as can be.

    Raises:
        DataError: there are fewer rows than folds.
    """
    if len(labels) < folds:
        raise DataError(f"{len(labels)} rows cannot be divided into {folds} folds", "use fewer evaluate.folds")
    rng = np.random.default_rng([seed, folds])
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(by_label[fold::folds]) for fold in range(folds)]
