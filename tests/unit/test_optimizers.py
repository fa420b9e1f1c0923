"""Each optimizer against its paper's update, written as plain float64 loops or taken from torch and torchao."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import tiny_dataset
from trainer import models, plugins, tasks
from trainer.config import Train
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.tasks.base import Task
from trainer.train import galore, muon, optimizers, sophia
from trainer.train.fit import fit
from trainer.train.state import seed_all

STEPS = 7
RATE, DECAY, BETA1, BETA2, EPS = 0.05, 0.1, 0.8, 0.9, 1e-3
COMMON = {"lr": RATE, "weight_decay": DECAY, "betas": (BETA1, BETA2), "eps": EPS}


class Two(nn.Module):
    """A matrix inside a network and a gain, of float64."""

    def __init__(self, rows: int = 6, columns: int = 4) -> None:
        super().__init__()
        random = np.random.default_rng(0)
        self.inner = nn.Parameter(torch.from_numpy(random.normal(size=(rows, columns))))
        self.gain = nn.Parameter(torch.from_numpy(random.normal(size=columns)))


def gradients(model: nn.Module) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return [{name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(STEPS)]


def trained(optimizer: str, model: nn.Module, **given) -> dict[str, np.ndarray]:
    """The values after steps with given gradients; Sophia's curvature is estimated from them as well."""
    built = optimizers.build(model, Train(optimizer=optimizer, **{**COMMON, **given}))
    for step, of in enumerate(gradients(model)):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(of[name].copy()).to(parameter.dtype)
        if isinstance(built, sophia.Sophia) and built.due(step):
            built.estimate(5.0, step)
        built.step()
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def expected(model: nn.Module, update) -> dict[str, np.ndarray]:
    """The values by `update(value, gradient, state, step, decay) -> value`, for one parameter at a time."""
    values = {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}
    states: dict[str, dict] = {name: {} for name in values}
    for step, of in enumerate(gradients(model)):
        for name, value in values.items():
            values[name] = update(value, of[name], states[name], step, DECAY if value.ndim > 1 else 0.0)
    return values


def lion(value, gradient, state, step, decay):
    momentum = state.get("m", np.zeros_like(value))
    direction = np.sign(BETA1 * momentum + (1 - BETA1) * gradient)
    state["m"] = BETA2 * momentum + (1 - BETA2) * gradient
    return value - RATE * (direction + decay * value)


def sophia_g(value, gradient, state, step, decay):
    if step % 3 == 0:
        state["h"] = BETA2 * state.get("h", 0.0) + (1 - BETA2) * 5.0 * gradient**2
    state["m"] = BETA1 * state.get("m", np.zeros_like(value)) + (1 - BETA1) * gradient
    value = value - RATE * decay * value
    return value - RATE * np.clip(state["m"] / np.maximum(0.5 * state["h"], EPS), -1, 1)


def adam_w(value, gradient, state, step, decay):
    state["m"] = BETA1 * state.get("m", 0.0) + (1 - BETA1) * gradient
    state["v"] = BETA2 * state.get("v", 0.0) + (1 - BETA2) * gradient**2
    first, second = state["m"] / (1 - BETA1 ** (step + 1)), state["v"] / (1 - BETA2 ** (step + 1))
    return value - RATE * decay * value - RATE * first / (np.sqrt(second) + EPS)


def galore_2(value, gradient, state, step, decay):
    """GaLore of rank 2 with a new subspace every 3 steps; the shorter side of the matrix is projected."""
    if value.ndim == 1:
        return adam_w(value, gradient, state, step, decay)
    wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    if step % 3 == 0:
        vectors = np.linalg.svd(wide)[0][:, :2]
        state["p"] = vectors * [np.sign(each[np.abs(each).argmax()]) for each in vectors.T]
    change = adam_w(np.zeros((2, wide.shape[1])), state["p"].T @ wide, state, step, 0.0)
    back = state["p"] @ change
    return value - RATE * decay * value + 0.25 * (back if back.shape == value.shape else back.T)


def adafactor(value, gradient, state, step, decay):
    beta = 1 - (step + 1) ** -0.8
    size = max(1e-3, math.sqrt(np.mean(value**2)))
    value = value - RATE * decay * value
    if value.ndim > 1:
        state["r"] = beta * state.get("r", 0.0) + (1 - beta) * np.mean(gradient**2, axis=1, keepdims=True)
        state["c"] = beta * state.get("c", 0.0) + (1 - beta) * np.mean(gradient**2, axis=0, keepdims=True)
        second = state["r"] @ state["c"] / state["r"].mean()
    else:
        state["v"] = second = beta * state.get("v", 0.0) + (1 - beta) * gradient**2
    update = gradient / np.sqrt(second)
    update /= max(1.0, math.sqrt(np.mean(update**2)))
    return value - min(RATE, 1 / math.sqrt(step + 1)) * size * update


REFERENCES = {
    "lion": (lion, {}), "sophia": (sophia_g, {"sophia": {"rho": 0.5, "every": 3}}), "adamw": (adam_w, {}),
    "galore": (galore_2, {"galore": {"rank": 2, "every": 3}}), "adafactor": (adafactor, {}),
    "adamw8bit": (adam_w, {}),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (3, 7)])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_update_is_the_papers(name, rows, columns):
    update, given = REFERENCES[name]
    wanted = expected(Two(rows, columns), update)
    found = trained(name, Two(rows, columns), **given)
    for key, value in wanted.items():
        # The subspace of GaLore is found in float32.
        np.testing.assert_allclose(found[key], value, rtol=1e-4 if name == "galore" else 1e-6, atol=1e-6, err_msg=key)


def test_eight_bits_are_those_of_torchao():
    from torchao.optim import adam as theirs
    from torchao.optim.subclass_8bit import OptimState8bit

    torch.manual_seed(0)
    value = torch.randn(64, 128)
    module = nn.Module()
    module.weight = nn.Parameter(value.clone())
    ours = optimizers.build(module, Train(optimizer="adamw8bit", **COMMON))
    first, second = (OptimState8bit.zeros((64, 128), signed, 256, dtype=torch.float32) for signed in (True, False))
    count = torch.tensor(0.0)
    for _ in range(STEPS):
        module.weight.grad = torch.randn(64, 128)
        count += 1
        theirs.single_param_adam(
            value, module.weight.grad, count, first, second, None, torch.tensor(RATE), BETA1, BETA2, DECAY, EPS, True, False
        )  # fmt: skip
        ours.step()
    torch.testing.assert_close(module.weight.detach(), value, rtol=1e-5, atol=1e-6)
    state = ours.state[module.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert (state["exp_avg"].int() - first.codes.int()).abs().max() <= 1


def test_without_torchao_eight_bits_are_refused_with_the_fix(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match="torchao") as caught:
        optimizers.build(Two(), Train(optimizer="adamw8bit"))
    assert "millrace[compress]" in caught.value.hint


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_stack_is_made_orthogonal_matrix_by_matrix(shape):
    stack = np.random.default_rng(2).normal(size=(3, *shape))
    found = muon.orthogonal(torch.from_numpy(stack), torch.float64).numpy()
    for ours, matrix in zip(found, stack, strict=True):
        np.testing.assert_allclose(ours, newton_schulz(matrix), rtol=1e-9, atol=1e-9)
        assert np.all(np.abs(np.linalg.svd(ours)[1] - 0.95) < 0.35)


def test_muon_is_torchs_and_does_not_mix_the_matrices_of_a_stack():
    def make() -> nn.ModuleList:
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in [(8, 24), (24, 8), (8, 24)])

    ours, theirs = make(), make()
    one = optimizers.build(ours, Train(optimizer="muon", muon_lr=RATE, weight_decay=DECAY, momentum=0.9))
    two = torch.optim.Muon(theirs.parameters(), lr=RATE, weight_decay=DECAY, momentum=0.9)
    for _ in range(STEPS):
        for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
            first.grad = torch.randn_like(first)
            second.grad = first.grad.clone()
        one.step()
        two.step()
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Both iterate in bfloat16, which has 8 bits.
        torch.testing.assert_close(first, second, rtol=0, atol=0.03 * RATE * STEPS)


def test_a_matrix_without_a_gradient_is_left_alone():
    for name in plugins.OPTIMIZERS:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        before = model[1].weight.detach().clone()
        optimizer = optimizers.build(model, Train(optimizer=name, weight_decay=0.1))
        for parameter in model[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert torch.equal(model[1].weight, before), name


def test_galore_keeps_moments_of_the_rank():
    model = Two(40, 10)
    built = optimizers.build(model, Train(optimizer="galore", galore={"rank": 3}))
    model.inner.grad, model.gain.grad = torch.randn(40, 10).double(), torch.randn(10).double()
    built.step()
    state = built.state[model.inner]
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "step": (), "projection": (10, 3), "exp_avg": (3, 40), "exp_avg_sq": (3, 40),
    }  # fmt: skip
    gram = state["projection"].mT @ state["projection"]
    torch.testing.assert_close(gram, torch.eye(3).double(), rtol=0, atol=1e-5)
    assert galore.leading(torch.randn(4, 9), 2).shape == (4, 2)


def test_labels_are_drawn_as_the_model_says_and_by_the_content_alone():
    inputs = torch.arange(1, 4001).view(4000, 1)
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0]).log_softmax(-1).expand(4000, 4)
    drawn = sophia.draw(logits, inputs, (3, 5))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].exp(), rtol=0, atol=0.03)
    wider = nn.functional.pad(inputs[10:20], (0, 5))
    assert torch.equal(sophia.draw(logits[10:20], wider, (3, 5)), drawn[10:20])
    assert not torch.equal(sophia.draw(logits, inputs, (3, 6)), drawn)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return {name: tiny_dataset(tmp_path_factory.mktemp(name) / "d", name, rows=120) for name in ("classify", "lm")}


class Killed(Exception):
    """The process ends here."""


def run(dataset, optimizer: str, *words: str, stop: int = 0, scratch=None):
    """(losses as bits, model) of a few steps of a small encoder or decoder; killed after step `stop`."""
    family = "encoder" if dataset.spec.task == "classify" else "decoder"
    common = [f"task.name={dataset.spec.task}", f"model.name={family}", "model.dim=16", "model.layers=2", "model.ff=16",
              "model.heads=2", "distill.enabled=false", "train.threads=1", "train.max_steps=12", "train.log_every=1",
              "train.checkpoint_every=1", "train.batch_size=8", "train.sophia.every=3", "train.galore.rank=4",
              "train.galore.every=4", f"train.optimizer={optimizer}"]  # fmt: skip
    params = load(None, [*common, *words])
    task: Task = tasks.build(params, dataset)
    seed_all(0)
    model = models.build(params.model, dataset.spec)

    def kill(step: int, *_: object) -> None:
        if step == stop:
            raise Killed

    fitted = fit(params, task, model, scratch=scratch, on_step=kill)
    return [float(row["train_loss"]).hex() for row in fitted.history if "train_loss" in row], fitted.model


@pytest.mark.parametrize("name", plugins.OPTIMIZERS)
def test_a_killed_run_goes_on_bit_for_bit(datasets, tmp_path, name):
    words = ["train.layer_decay=0.8", 'train.groups=[{"match": "*norm*", "lr_scale": 0}]', "model.dim=64"]
    whole, model = run(datasets["classify"], name, *words)
    with pytest.raises(Killed):
        run(datasets["classify"], name, *words, stop=7, scratch=tmp_path)
    resumed, again = run(datasets["classify"], name, *words, scratch=tmp_path)
    assert resumed == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("words", [[], ["train.precision=bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("task", ["classify", "lm"])
def test_sophias_estimate_does_not_depend_on_the_micro_batches(datasets, task, words):
    common = ["model.dropout=0.0", "train.sophia.every=2", *words]
    whole, _ = run(datasets[task], "sophia", *common)
    parts, _ = run(datasets[task], "sophia", *common, "train.batch_size=2", "train.accumulation=4")
    close = 1e-5 if not words else 0.1
    assert [float.fromhex(a) for a in parts] == pytest.approx([float.fromhex(a) for a in whole], abs=close)
