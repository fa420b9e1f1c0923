"""SIGTERM in the middle of something long: it is left at once, and the run that goes on ends with the same bits."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models
from trainer.config.load import load
from trainer.errors import Preempted
from trainer.tasks.classify import Classify
from trainer.train import probe, wrapped
from trainer.train.fit import fit
from trainer.train.state import seed_all

WORDS = [
    "task.name=classify", "model.name=encoder", "model.dim=16", "model.layers=1", "model.ff=16", "model.heads=2",
    "model.dropout=0.2", "distill.enabled=false", "train.threads=1", "train.max_steps=6", "train.log_every=1",
    "train.batch_size=8", "train.eval_every=3", "train.device=cpu",
]  # fmt: skip
# Native code that knows nothing of signals is as long; a test that waits for its end has failed.
LONG_S = 40.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("d") / "d", "classify", rows=160)


def train(dataset, *words, kind=Classify, scratch=None):
    params = load(None, [*WORDS, *words])
    seed_all(params.train.seed)
    return fit(params, kind(params, dataset), models.build(params.model, dataset.spec), scratch=scratch)


def terminated(ended: list[bool]) -> None:
    """SIGTERM comes, and what is being done goes on for long."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LONG_S)
    ended.append(True)


def assert_same(first, second):
    assert first.history == second.history
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.fixture
def compiled(monkeypatch):
    """Compilation by dynamo and a backend that leaves its graphs as they are: what `train.compile` goes through but for
    the generation of code. The list names the compilations that are interrupted, from 1; None interrupts none."""
    found = {"at": None, "number": 0, "ended": []}

    def backend(module, inputs):
        found["number"] += 1
        if found["number"] == found["at"]:
            terminated(found["ended"])
        return module.forward

    def compiling(model):
        for block in model.blocks:
            block.forward = wrapped.partial(
                wrapped._forward, torch.compile(block.forward, backend=backend), block.forward
            )

    monkeypatch.setattr(wrapped, "compile_blocks", compiling)
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("at", [1, 2])
def test_compilation_is_left_at_once(dataset, compiled, tmp_path, at):
    words = ["train.compile=true"]
    whole = train(dataset, *words)
    assert compiled["number"] > 1  # other lengths are compiled anew
    torch._dynamo.reset()
    compiled |= {"at": at, "number": 0}
    with pytest.raises(Preempted, match=r"SIGTERM at step \d of 6; a checkpoint was written") as caught:
        train(dataset, *words, scratch=tmp_path)
    assert not compiled["ended"]
    step = int(caught.value.message.split("step ")[1].split()[0])
    assert (step == 0) == (at == 1)
    assert [path.name for path in tmp_path.glob("train/step-*")] == [f"step-{step:09d}"]
    torch._dynamo.reset()
    compiled["at"] = None
    assert_same(train(dataset, *words, scratch=tmp_path), whole)


def test_an_error_of_a_compiler_that_the_signal_has_ended_is_no_error(dataset, compiled, tmp_path, monkeypatch):
    def ended(model):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("C++ compile error")

    def once(handler, number, frame):
        handler.asked = True

    monkeypatch.setattr("trainer.train.preempt.Preemption._ask", once)
    monkeypatch.setattr("trainer.train.loop.Loop._backward", lambda *_: ended(_))
    with pytest.raises(Preempted, match="SIGTERM at step 0 of 6; a checkpoint was written"):
        train(dataset, "train.compile=true", scratch=tmp_path)


class Slow(Classify):
    """A task in whose n-th forward pass with gradients SIGTERM comes, and in whose first evaluation, where it is 0."""

    at = -1
    made = 0

    def losses(self, model, batch):
        type(self).made += torch.is_grad_enabled()
        if self.made == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch)

    def tally(self, logits, batch):
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().tally(logits, batch)


@pytest.mark.parametrize("optimizer", ["adamw", "sophia"])
@pytest.mark.parametrize("at", [1, 2, 9, 11])
def test_many_micro_batches_are_left_between_two_of_them(dataset, tmp_path, at, optimizer):
    words = ["train.accumulation=4", "train.batch_size=2", f"train.optimizer={optimizer}", "train.sophia.every=2"]
    whole = train(dataset, *words)
    kind = type("Kind", (Slow,), {"at": at})
    with pytest.raises(Preempted, match="a checkpoint was written") as caught:
        train(dataset, *words, kind=kind, scratch=tmp_path)
    step = int(caught.value.message.split("step ")[1].split()[0])
    # Sophia's passes of sampled labels are not counted here: its curvature has changed, and the step is finished.
    assert step == (at - 1) // 4 + (optimizer == "sophia" and (at - 1) // 4 % 2 == 0)
    assert kind.made == at or optimizer == "sophia"
    assert_same(train(dataset, *words, scratch=tmp_path), whole)


def test_micro_batches_of_a_batch_of_another_size_are_left_too(dataset, tmp_path):
    words = ["train.batch_size=2", "train.growth.initial=8", "train.growth.target=8", "train.growth.minimum=2"]
    whole = train(dataset, *words)
    kind = type("Kind", (Slow,), {"at": 6})
    with pytest.raises(Preempted, match="SIGTERM at step 1 of 6; a checkpoint was written"):
        train(dataset, *words, kind=kind, scratch=tmp_path)
    assert kind.made == 6
    assert_same(train(dataset, *words, scratch=tmp_path), whole)


def test_an_evaluation_is_left_and_made_again(dataset, tmp_path):
    whole = train(dataset)
    kind = type("Kind", (Slow,), {"at": 0})
    with pytest.raises(Preempted, match="SIGTERM at step 3 of 6; a checkpoint was written"):
        train(dataset, kind=kind, scratch=tmp_path)
    assert_same(train(dataset, scratch=tmp_path), whole)


def test_a_measurement_is_left_and_leaves_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words, ended = ["train.precision=auto", "train.threads=auto"], []
    with monkeypatch.context() as patch:
        patch.setattr(probe.Probe, "_pass", lambda *_: terminated(ended))
        with pytest.raises(Preempted, match="SIGTERM while `auto` was measured"):
            train(dataset, *words, scratch=tmp_path / "scratch")
    assert not ended
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert train(dataset, *words, scratch=tmp_path / "scratch").steps == 6
