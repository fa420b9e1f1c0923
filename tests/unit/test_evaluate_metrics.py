"""Metrics and tests of significance against scikit-learn, scipy and cases worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluate import metrics, significance


@st.composite
def answers(draw):
    rows, labels = draw(st.integers(1, 60)), draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    return random.integers(labels, size=rows), random.dirichlet(np.full(labels, 0.4), size=rows), labels


@settings(max_examples=60, deadline=None)
@given(answers())
def test_figures_are_scikit_learns(case):
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
        log_loss,
        precision_recall_fscore_support,
    )

    actual, probabilities, labels = case
    predicted = probabilities.argmax(axis=1)
    found = metrics.classification(actual, probabilities, 10)
    assert found["accuracy"] == pytest.approx(accuracy_score(actual, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(actual, predicted, average="macro", zero_division=0))
    clipped = np.maximum(probabilities, 1e-12)
    assert found["loss"] == pytest.approx(
        log_loss(actual, clipped / clipped.sum(1, keepdims=True), labels=range(labels)), abs=1e-5
    )
    matrix = metrics.confusion_matrix(actual, predicted, labels)
    assert (matrix == confusion_matrix(actual, predicted, labels=range(labels))).all()
    expected = precision_recall_fscore_support(actual, predicted, labels=range(labels), zero_division=0)
    for ours, theirs in zip(metrics.per_class(matrix).values(), expected, strict=True):
        assert ours == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(answers())
def test_macro_f1_of_resamples_is_that_of_the_repeated_rows(case):
    from sklearn.metrics import f1_score

    actual, probabilities, labels = case
    predicted = probabilities.argmax(axis=1)
    weights = np.random.default_rng(1).integers(0, 3, size=(4, len(actual)))
    weights[:, 0] += 1
    found = metrics.macro_f1_samples(actual, predicted, weights.astype(float), labels)
    for value, counts in zip(found, weights, strict=True):
        expected = f1_score(np.repeat(actual, counts), np.repeat(predicted, counts), average="macro", zero_division=0)
        assert value == pytest.approx(expected)


def test_macro_f1_of_resamples_needs_no_matrix_of_rows_and_labels():
    """20,000 rows of 3,000 labels: rows x labels in float64 would be 480 MB."""
    import tracemalloc

    random = np.random.default_rng(0)
    actual, predicted = random.integers(3000, size=(2, 20_000))
    weights = random.integers(0, 3, size=(4, 20_000)).astype(float)
    tracemalloc.start()
    try:
        found = metrics.macro_f1_samples(actual, predicted, weights, 3000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.shape == (4,)
    assert peak < 10_000_000


def test_calibration_by_hand():
    """Two rows at 0.9, one right; one row at 0.6, right: (2 * |0.9 - 0.5| + 1 * |0.6 - 1|) / 3."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    error, bins = metrics.calibration(np.array([0, 1, 1]), probabilities, 10)
    assert error == pytest.approx(1.2 / 3)
    assert [each["rows"] for each in bins] == [1, 2]
    assert bins[1]["low"] == pytest.approx(0.8)


def test_a_confidence_of_one_is_in_the_last_bin():
    error, bins = metrics.calibration(np.array([0]), np.array([[1.0, 0.0]]), 5)
    assert error == 0
    assert bins[0]["high"] == 1.0


def test_labels_that_the_model_does_not_know_count_as_wrong():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1]])
    found = metrics.classification(np.array([0, -1]), probabilities, 10)
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3) / 2)


def test_softmax_does_not_overflow():
    found = metrics.softmax(np.array([[1e4, 0.0], [-1e4, -1e4]]))
    assert found == pytest.approx(np.array([[1.0, 0.0], [0.5, 0.5]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(both, only_first, only_second):
    from scipy.stats import binomtest

    first = np.array([True] * both + [True] * only_first + [False] * only_second, bool)
    second = np.array([True] * both + [False] * only_first + [True] * only_second, bool)
    p_value, a, b = significance.mcnemar(first, second)
    assert (a, b) == (only_first, only_second)
    total = only_first + only_second
    expected = binomtest(only_first, total, 0.5).pvalue if total else 1.0
    assert p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_rows_does_not_underflow_to_nonsense():
    first = np.ones(30_000, bool)
    p_value, _, _ = significance.mcnemar(first, ~first)
    assert 0 <= p_value < 1e-300


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 samples from a known difference of 0.1: about 95 % of the 95 % intervals hold it."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        actual = np.zeros(300, int)
        second = (random.random(300) > 0.6).astype(int)
        first = np.where(random.random(300) < 0.25, 0, second)
        found = significance.compare_labels(actual, first, second, 2, 200, 0.95, trial)["accuracy"]
        held += found["low"] <= 0.1 <= found["high"]
    assert 0.88 <= held / 200 <= 0.99


def test_comparing_a_model_with_itself_shows_nothing():
    actual = np.arange(50) % 3
    found = significance.compare_labels(actual, actual, actual, 3, 100, 0.9, 0)
    assert found["p_value"] == 1
    assert found["accuracy"] == found["macro_f1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    bits = np.arange(1.0, 20.0)
    assert significance.compare_bits(bits, bits, bits, 100, 0.9, 0)["p_value"] == 1


def test_the_order_of_models_flips_the_sign_and_nothing_else():
    random = np.random.default_rng(2)
    actual, a, b = random.integers(3, size=(3, 80))
    one = significance.compare_labels(actual, a, b, 3, 100, 0.9, 0)
    two = significance.compare_labels(actual, b, a, 3, 100, 0.9, 0)
    assert one["p_value"] == two["p_value"]
    assert one["macro_f1"]["value"] == pytest.approx(-two["macro_f1"]["value"])
    assert one["accuracy"]["low"] == pytest.approx(-two["accuracy"]["high"])


def test_bits_per_byte_are_weighted_by_bytes():
    first, second, size = np.array([10.0, 100.0]), np.array([20.0, 100.0]), np.array([10.0, 90.0])
    found = significance.compare_bits(first, second, size, 100, 0.9, 0)
    assert found["bits_per_byte"]["value"] == pytest.approx(-0.1)


@pytest.mark.parametrize(("shift", "small"), [(0.5, True), (0.0, False)])
def test_bootstrap_p_value_tells_a_shift_from_noise(shift, small):
    random = np.random.default_rng(4)
    size = random.integers(50, 500, 80).astype(float)
    second = 2 * size
    first = second - shift * size + random.normal(0, 20, 80)
    p_value = significance.compare_bits(first, second, size, 1000, 0.95, 0)["p_value"]
    assert (p_value < 0.01) == small
    assert p_value >= 2 / 1001


def test_many_rows_are_resampled_in_blocks(monkeypatch):
    monkeypatch.setattr(significance, "_BLOCK_CELLS", 100)
    blocks = list(significance._resamples(30, 10, 0))
    assert sum(len(block) for block in blocks) == 10
    assert len(blocks) == 4
    assert all((block.sum(axis=1) == 30).all() for block in blocks)
    assert not math.isclose(blocks[0].std(), 0)
