"""Too little memory: less is taken at a time, the step's batch and gradient stay as they were, and what was learnt is kept."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models
from trainer.config.load import load
from trainer.errors import ConfigError, OutOfMemory, Preempted
from trainer.stage import Call
from trainer.tasks import lm
from trainer.tasks.classify import Classify
from trainer.tasks.wrapped import Wrapped
from trainer.train import inject, memory, offload, optimizers, stage
from trainer.train.fit import fit
from trainer.train.state import seed_all

STEPS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("d") / "d", "classify", rows=160)


WORDS = [
    "task.name=classify", "model.name=encoder", "model.dim=16", "model.layers=1", "model.ff=16", "model.heads=2",
    "model.dropout=0.0", "distill.enabled=false", "train.threads=1", f"train.max_steps={STEPS}", "train.log_every=1",
    "train.batch_size=8", "train.optimizer=sgd", "train.lr=0.1",
]  # fmt: skip


def train(dataset, *words, kind=Classify, on_step=None, scratch=None):
    params = load(None, [*WORDS, *words])
    seed_all(params.train.seed)
    model = models.build(params.model, dataset.spec)
    return fit(params, kind(params, dataset), model, on_step=on_step, scratch=scratch)


def losses(fitted):
    return [row["train_loss"] for row in fitted.history if "train_loss" in row]


def events(fitted):
    return [row["event"] for row in fitted.history if "event" in row]


class Sized(Classify):
    """A task that notes how large its micro-batches are."""

    sizes: list[int]

    def losses(self, model, batch):
        self.sizes.append(len(batch["targets"]))
        return super().losses(model, batch)


def test_the_step_is_begun_again_with_smaller_micro_batches_and_is_the_same(dataset, monkeypatch):
    whole = train(dataset)
    monkeypatch.setenv(inject.VARIABLE, "oom@3:over3")
    kind = type("Kind", (Sized,), {"sizes": []})
    halved = train(dataset, kind=kind)
    assert losses(halved) == pytest.approx(losses(whole), abs=1e-6)
    assert kind.sizes == [8, 8] + [2] * 4 * (STEPS - 2)
    assert events(halved) == [
        "too little memory at step 3: micro-batches of 4 instead of 8, and more of them in a step",
        "too little memory at step 3: micro-batches of 2 instead of 4, and more of them in a step",
    ]


def test_a_step_begun_again_does_not_count_its_curvature_twice(dataset, monkeypatch):
    words = ["train.optimizer=sophia", "train.sophia.every=2", "train.betas=[0.9, 0.5]", "train.lr=0.01"]
    whole = train(dataset, *words)
    monkeypatch.setenv(inject.VARIABLE, "oom@3:over3")
    halved = train(dataset, *words)
    assert len(events(halved)) == 2
    assert losses(halved) == pytest.approx(losses(whole), abs=1e-5)


def test_what_was_learnt_outlives_the_process(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv(inject.VARIABLE, "oom@3:over3")

    def terminate(step, *_):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        train(dataset, on_step=terminate, scratch=tmp_path)
    monkeypatch.delenv(inject.VARIABLE)
    kind = type("Kind", (Sized,), {"sizes": []})
    train(dataset, kind=kind, scratch=tmp_path)
    assert kind.sizes == [2] * 4 * (STEPS - 5)


def test_nothing_left_to_try_is_an_error_that_says_what_was_tried(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "oom@2:over0")
    tried = "too little for step 2, with micro-batches of 1 and recomputed activations"
    with pytest.raises(ConfigError, match=tried) as caught:
        train(dataset)
    assert "data.max_length" in caught.value.hint


def test_stop_says_what_to_set(dataset, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "oom@2")
    with pytest.raises(ConfigError, match="too little memory: injected") as caught:
        train(dataset, "train.out_of_memory=stop")
    assert caught.value.hint.startswith("train.batch_size=4 train.accumulation=2")


def test_another_error_is_no_shortage_of_memory(dataset):
    class Broken(Classify):
        def losses(self, model, batch):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(dataset, kind=Broken)


def test_an_allocation_that_the_system_refuses_is_a_shortage():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_shortage(caught.value)
    assert not memory.is_shortage(RuntimeError("out of luck"))


def test_an_evaluation_takes_smaller_batches_too(dataset):
    whole = train(dataset)

    class Narrow(Classify):
        def tally(self, logits, batch):
            if len(logits) > 10:
                raise torch.OutOfMemoryError("injected")
            return super().tally(logits, batch)

    narrow = train(dataset, kind=Narrow)
    assert narrow.metrics["val_accuracy"] == whole.metrics["val_accuracy"]
    assert narrow.metrics["val_loss"] == pytest.approx(whole.metrics["val_loss"], abs=1e-6)
    assert events(narrow)[-1].endswith("evaluations in batches of 8 instead of 16")


def test_an_evaluation_of_a_language_model_begins_with_no_more_logits_than_fit(tmp_path, monkeypatch):
    data = tiny_dataset(tmp_path / "d", "lm", rows=60, max_length=16)
    params = load(None, ["task.name=lm", "model.name=decoder", "model.dim=24", "model.layers=1", "model.ff=16",
                         "train.max_steps=1", "train.batch_size=8", "train.threads=1", "distill.enabled=false"])  # fmt: skip
    sizes = []

    class Watched(lm.LanguageModel):
        def tally(self, logits, batch):
            sizes.append(logits.numel() * 4)
            return super().tally(logits, batch)

    found = []
    for most in (lm.LOGITS_BYTES, 3 * 4 * 16 * data.spec.vocab_size, 1):
        monkeypatch.setattr(lm, "LOGITS_BYTES", most)
        sizes.clear()
        seed_all(0)
        task = Watched(params, data)
        found.append(fit(params, task, models.build(params.model, data.spec)))
        assert max(sizes) == min(task.num_examples("val"), task.evaluation_batch()) * 4 * 16 * data.spec.vocab_size
        # What is put around a task, and what evaluates by itself, keeps to it too.
        assert Wrapped(task).evaluation_batch() == task.evaluation_batch()
        sizes.clear()
        task.evaluate(found[-1].model, "val")
        assert max(sizes) <= max(most, 4 * 16 * data.spec.vocab_size)
    assert [events(each) for each in found] == [[], [], []]
    for each in found[1:]:
        assert each.metrics == pytest.approx(found[0].metrics, rel=1e-6)


class Hungry(Classify):
    """A task that holds four megabytes for each example of a micro-batch, as activations would be."""

    def losses(self, model, batch):
        held = torch.ones(len(batch["targets"]), 1 << 20)
        terms = super().losses(model, batch)
        terms["held"] = held.sum() * 0.0
        return terms


@pytest.mark.skipif(not memory.STATUS.exists(), reason="Linux only")
def test_a_budget_of_a_cpu_is_kept(dataset):
    words = ["train.batch_size=64", "train.max_steps=3"]
    fitted = train(dataset, *words, "train.memory_gb=0.2", kind=Hungry)
    assert "micro-batches of 32 instead of 64" in events(fitted)[0]
    assert fitted.steps == 3
    assert events(train(dataset, *words, "train.memory_gb=2.0", kind=Hungry)) == []


def rated(model):
    return [{"params": list(model.parameters()), "initial_lr": 0.1}]


class Update(torch.optim.SGD):
    """An optimizer whose first update finds too little memory."""

    failures = 1

    def step(self, closure=None):
        if Update.failures:
            Update.failures -= 1
            raise torch.OutOfMemoryError("injected")
        return super().step(closure)


def test_weights_that_may_be_half_changed_are_read_from_the_checkpoint_again(dataset, monkeypatch, tmp_path):
    # What a GPU would learn is offloading, which a CPU refuses; here it is made to learn smaller micro-batches.
    monkeypatch.setattr(memory.Memory, "adapt_update", lambda self, now: now.memory.update(micro_batch=2))
    monkeypatch.setattr(optimizers, "build", lambda model, train, names: Update(rated(model), 0.1))
    with pytest.raises(OutOfMemory) as caught:
        train(dataset, scratch=tmp_path)
    assert caught.value.exit_code == 137
    assert json.loads((tmp_path / "train" / memory.LEARNT).read_text()) == {"micro_batch": 2}
    kind = type("Kind", (Sized,), {"sizes": []})
    train(dataset, kind=kind, scratch=tmp_path)
    assert set(kind.sizes) == {2}


def test_the_stage_begins_again_until_it_is_through(monkeypatch):
    left = [OutOfMemory("a"), OutOfMemory("b"), "made"]

    def once(call):
        found = left.pop(0)
        if isinstance(found, OutOfMemory):
            raise found
        return found

    monkeypatch.setattr(stage, "_run", once)
    assert stage.run(Call(load(None), {}, {}, None)) == "made"


def test_a_cpu_has_nothing_to_offload(dataset):
    with pytest.raises(ConfigError, match=r"train\.offload"):
        train(dataset, "train.offload=optimizer")


def test_the_optimizers_state_is_moved_around_each_update(monkeypatch):
    # The hooks alone: on a CPU both places are the same, and what they move is still found where it belongs.
    moved = []
    to_host = offload._to_host
    monkeypatch.setattr(offload, "_to_host", lambda optimizer, *_: (moved.append(optimizer), to_host(optimizer)))
    for name, parts in (("adamw", 1), ("muon", 2)):
        weights = {}
        for hooked in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
            optimizer = optimizers.build(model, load(None, [f"train.optimizer={name}"]).train)
            if hooked:
                offload.hook(optimizer)
            for _ in range(3):
                model(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
            weights[hooked] = model[0].weight
        assert torch.equal(weights[True], weights[False])
        assert len(moved) == 3 * parts
        moved.clear()
