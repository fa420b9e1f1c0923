"""Tasks: batches, units, losses and metrics, against the slow and obvious computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.tasks.base import balanced_weights

FAMILY = {"classify": "ngram", "lm": "decoder", "image": "cnn"}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return {name: tiny_dataset(tmp_path_factory.mktemp(name) / "d", name, rows=120) for name in FAMILY}


def build(datasets, name, *overrides):
    words = [f"task.name={name}", f"model.name={FAMILY[name]}", "distill.enabled=false", *overrides]
    params = load(None, words)
    torch.manual_seed(0)
    return tasks.build(params, datasets[name]), models.build(params.model, datasets[name].spec).eval()


def test_classify_batch_holds_the_rows_tokens_and_nothing_else(datasets):
    task, _ = build(datasets, "classify")
    data = task.split("train")
    index = np.array([5, 0, 17])
    batch = task.batch("train", index)
    for row, i in enumerate(index):
        wanted = data.tokens[data.offsets[i] : data.offsets[i + 1]][: task.spec.max_length].tolist()
        assert batch["inputs"][row].tolist() == wanted + [0] * (batch["inputs"].shape[1] - len(wanted))
    assert batch["targets"].tolist() == data.labels[index].tolist()
    assert batch["inputs"].shape[1] <= task.spec.max_length


def test_for_a_compiled_model_batches_have_few_widths_and_the_same_rows(datasets):
    task, _ = build(datasets, "classify", "data.max_length=48")
    few, _ = build(datasets, "classify", "data.max_length=48", "train.compile=true")
    widths = set()
    for row in range(task.num_examples("train")):
        plain, coarse = (each.batch("train", np.array([row]))["inputs"] for each in (task, few))
        widths.add(coarse.shape[1])
        assert plain.shape[1] <= coarse.shape[1]
        assert torch.equal(coarse[:, : plain.shape[1]], plain)
        assert not coarse[:, plain.shape[1] :].any()
    assert widths <= {8, 16, 32, 64, task.spec.max_length}


def test_lm_predicts_each_token_but_the_first_exactly_once(datasets):
    task, _ = build(datasets, "lm")
    tokens = np.asarray(task.split("val").tokens)
    batch = task.batch("val", np.arange(task.num_examples("val")))
    targets = batch["targets"].flatten()
    assert targets[targets != -100].tolist() == tokens[1:].tolist()
    assert batch["inputs"].flatten()[: len(tokens) - 1].tolist() == tokens[:-1].tolist()
    assert task.units(batch) == len(tokens) - 1


def test_lm_bits_per_byte_is_the_cross_entropy_of_the_whole_split(datasets):
    task, model = build(datasets, "lm", "model.layers=1")
    batch = task.batch("val", np.arange(task.num_examples("val")))
    with torch.no_grad():
        logits = model(batch["inputs"])
    nats = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum").item()
    found = task.evaluate(model, "val", batch_size=3)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / task.dataset.meta["bytes"]["val"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


@pytest.mark.parametrize("name", ["classify", "image"])
def test_metrics_equal_scikit_learns(datasets, name):
    metrics = pytest.importorskip("sklearn.metrics")
    task, model = build(datasets, name)
    batch = task.batch("train", np.arange(task.num_examples("train")))
    with torch.no_grad():
        predicted = model(batch["inputs"]).argmax(1)
    found = task.evaluate(model, "train", batch_size=7)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(batch["targets"], predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(batch["targets"], predicted, average="macro"))


@pytest.mark.parametrize("name", FAMILY)
def test_sharded_tallies_add_up_to_the_whole(datasets, name):
    task, model = build(datasets, name)
    parts = [task.total(model, "val", 4, (rank, 3)) for rank in range(3)]
    whole = task.total(model, "val", 4)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-9)


def test_evaluation_leaves_mode_and_generators_alone(datasets):
    task, model = build(datasets, "classify")
    model.train()
    before = torch.get_rng_state()
    task.evaluate(model, "val")
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_losses_are_sums(datasets):
    task, model = build(datasets, "classify", "train.label_smoothing=0.1", "train.class_weights=balanced")
    whole = sum(task.losses(model, task.batch("train", np.arange(12))).values())
    parts = sum(sum(task.losses(model, task.batch("train", np.array([i]))).values()) for i in range(12))
    torch.testing.assert_close(whole, parts)


def test_balanced_weights_average_to_one_and_make_classes_weigh_alike():
    labels = np.array([0] * 6 + [2] * 2)
    weights = balanced_weights(labels, 4)
    assert weights[labels].mean() == pytest.approx(1.0)
    assert weights[0] * 6 == pytest.approx(float(weights[2]) * 2)
    assert weights[1] == weights[3] == 0


@pytest.mark.parametrize("name", FAMILY)
def test_order_is_a_permutation_fixed_by_the_generator(datasets, name):
    task, _ = build(datasets, name)
    first, again, other = (task.order("train", np.random.default_rng(seed), 8) for seed in (1, 1, 2))
    assert sorted(first.tolist()) == list(range(task.num_examples("train")))
    assert first.tolist() == again.tolist() != other.tolist()


def test_blocks_of_an_epoch_hold_texts_of_like_length(datasets):
    task, _ = build(datasets, "classify")
    lengths = task.lengths("train")
    order = task.order("train", np.random.default_rng(0), 8)
    padded = sum(lengths[order[i : i + 8]].max() * 8 for i in range(0, len(order), 8))
    shuffled = np.random.default_rng(0).permutation(len(order))
    naive = sum(lengths[shuffled[i : i + 8]].max() * 8 for i in range(0, len(order), 8))
    assert padded < 0.9 * naive


def test_augmented_pictures_are_the_pictures_a_little_changed(datasets):
    task, _ = build(datasets, "image")
    batch = task.batch("train", np.arange(40))
    changed, again, other = (task.augment(batch, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(changed["inputs"], again["inputs"])
    assert not torch.equal(changed["inputs"], other["inputs"])
    assert changed["targets"] is batch["targets"]
    assert changed["inputs"].shape == batch["inputs"].shape
    assert 0.0 <= float(changed["inputs"].min()) <= float(changed["inputs"].max()) <= 1.0
    # No farther from its own original than from the most similar other one, or little.
    distance = torch.cdist(changed["inputs"].flatten(1), batch["inputs"].flatten(1))
    own = distance.diagonal()
    assert (own > 0).all()
    assert (own <= 1.2 * distance.min(1).values).float().mean() > 0.9


def test_dataset_of_another_task_is_refused(datasets):
    with pytest.raises(ConfigError, match="made for 'image'"):
        tasks.build(load(None, []), datasets["image"])
