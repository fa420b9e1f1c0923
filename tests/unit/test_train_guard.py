"""Steps and evaluations that are not finite: nothing of them reaches the weights, and each policy does what it says."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.errors import ConfigError, DivergedError, Preempted
from trainer.tasks.classify import Classify
from trainer.train import inject
from trainer.train.fit import fit
from trainer.train.state import seed_all

STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("d") / "d", "classify", rows=160)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("i") / "d", "image", rows=160)


def train(dataset, *words, kind=None, model="ngram", on_step=None, scratch=None):
    """A fitted run, and the weights after each step."""
    small = ["model.buckets=512", "model.dim=16"] if model == "ngram" else ["model.width=4"]
    name = "classify" if model == "ngram" else "image"
    common = ["train.threads=1", f"train.max_steps={STEPS}", "train.log_every=1", "train.batch_size=8"]
    params = load(None, [f"task.name={name}", f"model.name={model}", "distill.enabled=false", *small, *common, *words])
    task = kind(params, dataset) if kind else tasks.build(params, dataset)
    seed_all(params.train.seed)
    weights = {}

    def keep(step, total, model):
        weights[step] = copy.deepcopy(model.state_dict())
        if on_step:
            on_step(step)

    return fit(params, task, models.build(params.model, dataset.spec), on_step=keep, scratch=scratch), weights


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def events(fitted):
    return [row["event"] for row in fitted.history if "event" in row]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan-loss", "step 5 of 12: loss nan is not finite, in term injected"),
        ("nan-gradient", "step 5 of 12: gradient norm nan is not finite, first in "),
        ("nan-input", "step 5 of 12: inputs are not finite in rows .* of the train split"),
    ],
)
def test_stop_names_what_is_not_finite_and_leaves_the_weights(dataset, pictures, monkeypatch, fault, message):
    monkeypatch.setenv(inject.VARIABLE, f"{fault}@5")
    held = []
    data, model = (pictures, "cnn") if fault == "nan-input" else (dataset, "ngram")
    with pytest.raises(DivergedError, match=message) as caught:
        train(data, model=model, on_step=held.append)
    assert held == [1, 2, 3, 4]
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("fault", ["nan-loss", "nan-gradient", "nan-input"])
def test_skip_leaves_the_step_out_and_goes_on(dataset, pictures, monkeypatch, fault):
    monkeypatch.setenv(inject.VARIABLE, f"{fault}@5,{fault}@7")
    data, model = (pictures, "cnn") if fault == "nan-input" else (dataset, "ngram")
    fitted, weights = train(data, "train.nonfinite.policy=skip", model=model)
    assert equal(weights[4], weights[5])
    assert equal(weights[6], weights[7])
    assert not equal(weights[7], weights[8])
    assert fitted.steps == STEPS
    assert [event.endswith(f"left out ({n} so far)") for n, event in enumerate(events(fitted), 1)] == [True, True]
    assert all(row["train_loss"] < 10 for row in fitted.history if "train_loss" in row)


def test_only_so_many_steps_are_skipped(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "nan-loss@3,nan-loss@5,nan-loss@9")
    held = []
    with pytest.raises(DivergedError, match=r"step 9 of 12: .*after 2 of its kind"):
        train(dataset, "train.nonfinite.policy=skip", "train.nonfinite.limit=2", on_step=held.append)
    assert held[-1] == 8


ROLLBACK = ["train.nonfinite.policy=rollback", "train.nonfinite.lr_factor=0.5", "train.checkpoint_every=4"]


def test_rollback_goes_back_to_the_last_good_weights_with_a_lower_rate_each_time(dataset, monkeypatch):
    words = [*ROLLBACK, "train.schedule=constant", "train.lr=0.01"]
    _, before = train(dataset, *words)
    monkeypatch.setenv(inject.VARIABLE, "nan-gradient@3,nan-loss@7,nan-loss@8")
    fitted, weights = train(dataset, *words)
    seed_all(0)
    untouched = models.build(load(None, ["model.name=ngram", "model.buckets=512", "model.dim=16"]).model, dataset.spec)
    assert equal(weights[3], untouched.state_dict())
    assert equal(weights[7], weights[4])
    assert equal(weights[8], weights[4])
    rates = {row["step"]: row["lr"] for row in fitted.history if "lr" in row}
    assert [rates[step] for step in (2, 4, 6, 9, STEPS)] == [0.01, 0.005, 0.005, 0.00125, 0.00125]
    assert fitted.steps == STEPS
    assert len(events(fitted)) == 3
    assert equal(before[2], weights[2])
    # The optimizer went back too: its moments are again those of the beginning, so the next step is the first one's size.
    assert not equal(weights[3], weights[4])


def test_the_batch_that_did_harm_is_not_met_again(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "nan-loss@6")
    seen = []

    class Watched(Classify):
        def batch(self, split, index):
            if split == "train":
                seen.append(tuple(index))
            return super().batch(split, index)

    train(dataset, *ROLLBACK, kind=Watched)
    assert len(seen) == len(set(seen)) == STEPS


@pytest.mark.parametrize("kill", [4, 6, 8, 10])
def test_a_resumed_run_remembers_its_rollbacks_and_where_to_go_back(dataset, monkeypatch, tmp_path, kill):
    # A save after any step, as on SIGTERM; the run goes back twice, once before and once after the kill.
    words = [*ROLLBACK, "train.checkpoint_every=5", "model.dropout=0.1"]
    monkeypatch.setenv(inject.VARIABLE, "nan-loss@3,nan-loss@9")
    whole, _ = train(dataset, *words)

    def terminate(step):
        if step == kill:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(dataset, *words, on_step=terminate, scratch=tmp_path)
    resumed, _ = train(dataset, *words, scratch=tmp_path)
    assert resumed.history == whole.history
    assert equal(resumed.model.state_dict(), whole.model.state_dict())


def test_an_overflow_of_fp16_is_no_divergence_and_a_nan_loss_is(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "nan-gradient@3")
    fitted, weights = train(dataset, "train.precision=fp16")
    assert equal(weights[2], weights[3])
    assert events(fitted) == []
    monkeypatch.setenv(inject.VARIABLE, "nan-loss@3")
    with pytest.raises(DivergedError, match="step 3 of 12: loss"):
        train(dataset, "train.precision=fp16")
    fitted, _ = train(dataset, "train.precision=fp16", "train.nonfinite.policy=skip")
    assert len(events(fitted)) == 1


def test_a_gradient_too_large_to_be_summed_up_is_refused(dataset):
    class Large(Classify):
        def losses(self, model, batch):
            weight = next(model.parameters())
            return super().losses(model, batch) | {"large": (weight - weight.detach()).sum() * 1e30}

    with pytest.raises(DivergedError, match="step 1 of 12: gradient norm inf is not finite, too large to be summed up"):
        train(dataset, kind=Large)


class Normed(torch.nn.Module):
    """A model with running means."""

    def __init__(self, spec):
        super().__init__()
        self.embedding = torch.nn.Embedding(spec.vocab_size, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, spec.num_labels)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens).mean(1)))


def test_running_means_of_a_refused_step_are_put_back(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "nan-loss@3")
    monkeypatch.setattr(models, "build", lambda config, spec: Normed(spec))
    _, weights = train(dataset, "train.nonfinite.policy=skip")
    assert equal(weights[2], weights[3])
    assert not torch.equal(weights[1]["norm.running_mean"], weights[2]["norm.running_mean"])


class Scored(Classify):
    """A task whose validation scores are written down in advance."""

    scores = (float("nan"), 0.3, float("nan"), 0.2)

    def __init__(self, *args):
        super().__init__(*args)
        self.left = list(self.scores)

    def summarise(self, split, total):
        return {**super().summarise(split, total), "accuracy": self.left.pop(0)}


def test_a_score_that_is_not_finite_is_never_the_best(dataset):
    fitted, _ = train(dataset, "train.eval_every=3", "train.nonfinite.policy=skip", kind=Scored)
    assert fitted.best_step == 6
    assert len(events(fitted)) == 2
    with pytest.raises(DivergedError, match="evaluation after step 3 of 12: val_accuracy nan"):
        train(dataset, "train.eval_every=3", kind=Scored)
    never = type("Never", (Scored,), {"scores": (float("nan"),) * 4})
    with pytest.raises(DivergedError, match="no evaluation was finite"):
        train(dataset, "train.eval_every=3", "train.nonfinite.policy=skip", kind=never)


def test_a_fault_of_another_form_is_refused():
    assert [fault.kind for fault in inject.parse("nan-loss@1,oom@2:rank1,kill@3:rank0:over4", 1)] == ["nan-loss", "oom"]
    for text in ("nan@1", "oom", "oom@x", "oom@1:rank"):
        with pytest.raises(ConfigError, match="MILLRACE_FAULT"):
            inject.parse(text, 0)
