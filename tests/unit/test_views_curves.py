"""Matrices, curves and numbers of the run page, from figures made up here."""

import json
import math

import numpy as np
import pytest

from trainer import views
from trainer.evaluate.roc import micro_roc
from trainer.views import curves
from trainer.views import markdown as md


def test_a_matrix_of_many_labels_keeps_the_frequent_and_counts_all() -> None:
    counts = {(f"label {a:03d}", f"label {b:03d}"): 1 + (a < 50) * 10 for a in range(120) for b in range(120)}
    names, matrix = curves.confusion(counts)
    assert len(names) == curves.LABELS + 1
    assert names == [*(f"label {number:03d}" for number in range(50)), "other (70 labels)"]
    assert sum(map(sum, matrix)) == sum(counts.values())
    assert matrix[-1][-1] == 70 * 70
    worst = {("x" * 5000 + str(a), "\x00" * 99 + str(b)): 10**9 for a in range(90) for b in range(90)}
    names, matrix = curves.confusion(worst)
    assert len(set(names)) == len(names) == 51
    assert len(json.dumps([names, matrix])) < 60_000


def test_names_of_a_matrix_are_distinct_and_never_empty() -> None:
    names, _ = curves.confusion({("", " "): 1, ("a\n", "a"): 1, ("other (1 labels)", "a (2)"): 2}, most=5)
    assert len(names) == 6
    assert len(set(names)) == 6
    assert all(name.strip() for name in names)


def test_the_curve_is_scikit_learns() -> None:
    from sklearn.metrics import auc, roc_curve

    random = np.random.default_rng(1)
    for rows, labels, sharp in ((400, 5, 3.0), (50, 2, 0.1), (900, 30, 8.0)):
        actual = random.integers(0, labels, rows)
        logits = random.normal(size=(rows, labels)) + sharp * np.eye(labels)[actual] * random.random((rows, 1))
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        rounded = np.rint(scores * 1e6) / 1e6
        false, true, cut = roc_curve(np.eye(labels)[actual].ravel(), rounded.ravel(), drop_intermediate=False)
        theirs = {round(c * 1e6): (f, t) for f, t, c in zip(false[1:], true[1:], cut[1:], strict=True)}
        ours = micro_roc(actual, scores)
        assert len(ours) <= 100
        assert ours[0][1:] == (0.0, 0.0)
        assert ours[-1][1:] == (1.0, 1.0)
        assert ours[0][0] > rounded.max()
        for threshold, f, t in ours[1:]:
            assert theirs[round(threshold * 1e6)] == pytest.approx((f, t))
        assert auc(*zip(*[point[1:] for point in ours], strict=True)) == pytest.approx(auc(false, true), abs=2e-3)
        assert [point[0] for point in ours] == sorted({point[0] for point in ours}, reverse=True)


def test_the_curve_of_certain_and_of_equal_scores_is_finite() -> None:
    certain = micro_roc(np.asarray([0, 1]), np.eye(2))
    assert certain == [(1.000001, 0.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
    assert micro_roc(np.asarray([0, 1]), np.full((2, 2), 0.5)) == [(0.500001, 0.0, 0.0), (0.5, 1.0, 1.0)]
    assert micro_roc(np.zeros(3, int), np.ones((3, 1))) == []
    assert micro_roc(np.zeros(0, int), np.ones((0, 3))) == []


@pytest.mark.parametrize("value", ["inf", "nan", "", "x"])
def test_a_curve_that_is_not_finite_is_left_out(tmp_path, value) -> None:
    (tmp_path / "roc.csv").write_text(
        f"threshold,false_positive_rate,true_positive_rate\n{value},0.0,0.0\n0.5,1.0,1.0\n"
    )
    assert views.classification({"evaluation": tmp_path}) == {}


def test_metrics_of_evaluate_keep_their_names_without_its_folder() -> None:
    assert views.metrics("evaluate", {"accuracy": 0.5, "x": math.inf}) == {"candidate_accuracy": 0.5}


def test_numbers_say_how_large_they_are() -> None:
    assert [md.number(value) for value in (1234567, 0.123456, 12345.6, 0, 1e-9, None, True, math.nan, "<b>")] == [
        "1,234,567", "0.1235", "12,346", "0", "1e-09", "–", "–", "–", "–",
    ]  # fmt: skip
    assert [md.size(value) for value in (999, 1500, 250_000, 3.2e9, None)] == [
        "999 B",
        "1.5 kB",
        "250 kB",
        "3.2 GB",
        "–",
    ]
    assert [md.seconds(value) for value in (0.44, 9.97, 59.6, 3599.7, 7800)] == [
        "0.4 s", "10 s", "1 min 00 s", "1 h 00 min", "2 h 10 min",
    ]  # fmt: skip
