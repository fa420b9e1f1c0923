"""Schedules, optimizers and state: the parts of the loop on their own."""

from __future__ import annotations

import platform
import random

import numpy as np
import pytest
import torch
from torch import nn

from trainer import plugins
from trainer.config import Train
from trainer.train import device, optimizers, schedules, state
from trainer.train.checkpoint import join, split
from trainer.train.memory import resident
from trainer.train.named_state import named_state, set_named_state

TOTAL = 100


def rates(**given) -> list[float]:
    return [schedules.factor(step, TOTAL, Train(**given)) for step in range(TOTAL)]


@pytest.mark.parametrize("name", plugins.SCHEDULES)
def test_every_schedule_warms_up_in_a_line_to_the_peak(name):
    found = rates(schedule=name, warmup=0.1)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert max(found) <= 1.0 + 1e-12


@pytest.mark.parametrize("name", plugins.SCHEDULES)
def test_every_schedule_keeps_between_the_floor_and_the_peak(name):
    found = rates(schedule=name, min_lr_ratio=0.2, restarts=3, power=2.0)
    assert all(0.2 - 1e-12 <= rate <= 1.0 + 1e-12 for rate in found)


def test_shapes_at_known_places():
    places = {
        "constant": (1.0, 1.0), "linear": (0.5, 0.01), "cosine": (0.5, 0.00024672), "polynomial": (0.125, 1e-6),
        "exponential": (0.1, 0.01 ** 0.99), "wsd": (1.0, 0.05), "cosine_restarts": (1.0, 0.00098664),
    }  # fmt: skip
    for name, (middle, last) in places.items():
        found = rates(schedule=name, power=3.0, restarts=2)
        assert (found[50], found[99]) == pytest.approx((middle, last), rel=1e-3), name


def test_restarts_return_to_the_peak():
    found = rates(schedule="cosine_restarts", restarts=4)
    assert [i for i in range(1, TOTAL) if found[i] > found[i - 1]] == [25, 50, 75]


def test_warmup_counts_steps_from_one_on():
    assert schedules.warmup_steps(Train(warmup=0.25), 40) == 10
    assert schedules.warmup_steps(Train(warmup=7), 40) == 7
    assert schedules.warmup_steps(Train(warmup=700), 40) == 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 6)
        self.inner = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.output = nn.Linear(6, 3)

    def forward(self, x):
        return self.output(self.norm(torch.relu(self.inner(self.embedding(x)))))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(torch.arange(10)), torch.arange(10) % 3)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", plugins.OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_exactly_from_its_state(name):
    train = Train(optimizer=name, lr=0.02, weight_decay=0.01)
    model = Net()
    optimizer = optimizers.build(model, train)
    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    plain, tensors = split(named_state(optimizer, model))
    saved = {key: value.clone() for key, value in tensors.items()}
    other = Net()
    other.load_state_dict(model.state_dict())
    resumed = optimizers.build(other, train)
    set_named_state(resumed, other, join(plain, saved))
    assert [step(model, optimizer) for _ in range(5)] == [step(other, resumed) for _ in range(5)]


@pytest.mark.parametrize("name", plugins.OPTIMIZERS)
def test_rate_of_the_groups_is_the_rate_that_is_used(name):
    model = Net()
    optimizer = optimizers.build(model, Train(optimizer=name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for group in optimizer.param_groups:
        assert group["initial_lr"] > 0
        group["lr"] = 0.0
    step(model, optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_only_matrices_decay(name):
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = optimizers.build(model, Train(optimizer=name, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {key: bool((value < 1.0).all()) for key, value in model.named_parameters()}
    assert shrunk == {key: value.ndim >= 2 for key, value in model.named_parameters()}


def test_muon_takes_inner_matrices_and_adamw_the_rest():
    model = Net()
    both = optimizers.build(model, Train(optimizer="muon"))
    step(model, both)
    taken = {name for name, parameter in model.named_parameters() if "momentum_buffer" in both.state[parameter]}
    assert taken == {"inner.weight"}
    rest = {name for name, parameter in model.named_parameters() if "exp_avg_sq" in both.state[parameter]}
    assert rest == {name for name, _ in model.named_parameters()} - taken


def test_state_of_the_generators_comes_back():
    device = torch.device("cpu")
    state.seed_all(3)
    random.gauss(0, 1)
    kept = state.rng_state(device)

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()

    first = draw()
    state.seed_all(4)
    assert draw() != first
    state.set_rng_state(kept, device)
    assert draw() == first


def test_ranks_draw_differently_and_reproducibly():
    drawn = []
    for rank in (0, 1, 0):
        state.seed_all(5, rank)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_trees_come_back_whole():
    tree = {"a": [1, (2.5, None, "x"), {3: torch.ones(2), "b": {}}], "c": torch.zeros(0, 3), "d": True, "e": []}
    plain, tensors = split(tree)
    again = join(plain, tensors)
    assert torch.equal(again["a"][2].pop(3), tree["a"][2].pop(3))
    assert again.pop("c").shape == tree.pop("c").shape
    assert again == tree


def test_objects_have_no_place_in_a_checkpoint():
    with pytest.raises(TypeError, match="/a/0: a set"):
        split({"a": [{1, 2}]})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_that_a_step_has_freed_is_there_for_the_next_and_given_back_at_the_end(kept):
    # More than glibc ever keeps by itself.
    size = 48 << 20
    with device.pages_kept(kept):
        for _ in range(2):
            torch.ones(size, dtype=torch.int8)
        held = resident("VmRSS")
    assert (held - resident("VmRSS") > size // 2) == kept
