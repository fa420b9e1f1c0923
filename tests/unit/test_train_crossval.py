"""Cross-validation: folds are fair, and no row is ever judged by a model that saw it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny import tiny_dataset
from trainer.config.load import load
from trainer.errors import ConfigError, DataError
from trainer.train import crossval

FAMILY = {"classify": ["model.name=ngram", "model.buckets=512"], "image": ["model.name=cnn", "model.width=4"]}


def test_folds_share_out_all_rows_and_every_label_evenly():
    labels = np.repeat([0, 1, 2], [50, 13, 7])
    folds = crossval.stratified(labels, 5, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(70))
    for label, count in ((0, 50), (1, 13), (2, 7)):
        shares = [int((labels[fold] == label).sum()) for fold in folds]
        assert max(shares) - min(shares) <= 1, (label, count)
    assert [f.tolist() for f in folds] != [f.tolist() for f in crossval.stratified(labels, 5, seed=1)]


@pytest.mark.parametrize("task", FAMILY)
def test_no_row_is_judged_by_a_model_that_saw_it(task, tmp_path, monkeypatch):
    dataset = tiny_dataset(tmp_path / "d", task, rows=90)
    seen = []

    def watched(params, built, model, **given):
        splits = {name: built.split(name) for name in ("train", "val")}
        rows = {name: [row_of(split, i) for i in range(len(split))] for name, split in splits.items()}
        assert not set(rows["train"]) & set(rows["val"])
        seen.extend(rows["val"])
        return fit(params, built, model, **given)

    fit = crossval.fit
    monkeypatch.setattr(crossval, "fit", watched)
    params = load(
        None, [f"task.name={task}", *FAMILY[task], "distill.enabled=false", "train.epochs=2", "train.threads=1"]
    )
    scores = crossval.cross_validate(params, dataset, 3, workers=1)
    assert len(scores) == 3
    assert all(0.0 <= score <= 1.0 for score in scores)
    merged = crossval.merge(dataset)
    assert sorted(seen) == sorted(row_of(merged, i) for i in range(len(merged)))


def test_folds_in_processes_of_their_own_score_the_same(tmp_path):
    dataset = tiny_dataset(tmp_path / "d", "classify", rows=60)
    params = load(None, [*FAMILY["classify"], "distill.enabled=false", "train.epochs=2", "train.lr=0.03"])
    alone, together = (crossval.cross_validate(params, dataset, 2, workers) for workers in (1, 2))
    assert alone == together


def row_of(split, i: int) -> bytes:
    if split.images.size:
        return np.asarray(split.images[i]).tobytes()
    return np.asarray(split.tokens[split.offsets[i] : split.offsets[i + 1]]).tobytes()


def test_impossible_folds_are_refused(tmp_path):
    params = load(None, ["distill.enabled=false"])
    dataset = tiny_dataset(tmp_path / "d", "classify", rows=30)
    with pytest.raises(ConfigError, match="folds"):
        crossval.cross_validate(params, dataset, 1)
    with pytest.raises(DataError, match="31 folds"):
        crossval.cross_validate(params, dataset, 31)
