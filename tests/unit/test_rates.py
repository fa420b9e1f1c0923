"""Rates of single parameters: layer-wise decay, groups by pattern, freezing; and chained schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs

from tests.tiny import tiny_dataset
from trainer import models, plugins, tasks
from trainer.artifacts.dataset import Spec
from trainer.config import Train
from trainer.config.load import load
from trainer.config.model import FAMILIES
from trainer.errors import ConfigError
from trainer.train import optimizers, schedules
from trainer.train.fit import fit

SPECS = {"classify": Spec("classify", vocab_size=50, num_labels=3, max_length=16), "lm": Spec("lm", vocab_size=50, max_length=16),
         "image": Spec("image", num_labels=3, image_size=8, image_channels=1)}  # fmt: skip


def make(family: str = "encoder", **given) -> nn.Module:
    kind, _, learns = FAMILIES[family]
    return models.build(kind(name=family, **given), SPECS[learns[0]])


def used(model: nn.Module, **given) -> dict[str, tuple[float, float]]:
    """(rate, decay) of each parameter that the optimizer has."""
    optimizer = optimizers.build(model, Train(**{"lr": 1.0, "muon_lr": 1.0, "weight_decay": 0.5, **given}))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "galore"])
@pytest.mark.parametrize("family", ["encoder", "decoder", "vit"])
def test_rates_fall_from_the_output_to_the_embedding(family, optimizer):
    model = make(family, layers=3, heads=2, dim=16, **({"tie_embeddings": False} if family == "decoder" else {}))
    found = used(model, layer_decay=0.5, optimizer=optimizer)
    assert set(found) == {name for name, _ in model.named_parameters()}
    below = {"encoder": ["embedding", "position"], "decoder": ["embedding"], "vit": ["patches", "position"]}[family]
    for name, (rate, _) in found.items():
        first = name.split(".")[0]
        wanted = 0.5 ** (3 - int(name.split(".")[1])) if first == "blocks" else 0.5**4 if first in below else 1.0
        assert rate == wanted, name


def test_a_part_of_a_model_gets_the_rates_of_the_whole():
    whole = make(layers=4)
    wanted = used(whole, layer_decay=0.5, groups=[{"match": "output.*", "lr_scale": 7.0}])
    names = [name for name, _ in whole.named_parameters()]
    whole.output = None
    setattr(whole.blocks, "3", None)
    train = Train(lr=1.0, layer_decay=0.5, groups=[{"match": "output.*", "lr_scale": 7.0}])
    of = {
        parameter: group["lr"]
        for group in optimizers.build(whole, train, names).param_groups
        for parameter in group["params"]
    }
    assert {name: of[parameter] for name, parameter in whole.named_parameters()} == {
        name: wanted[name][0] for name, _ in whole.named_parameters()
    }


def test_layers_can_be_told_apart_only_where_there_are_blocks():
    with pytest.raises(ConfigError, match=r"train\.layer_decay: 0\.9, but this model has no blocks"):
        used(make("textcnn"), layer_decay=0.9)


@pytest.mark.parametrize("optimizer", plugins.OPTIMIZERS)
def test_the_first_group_that_matches_counts(optimizer):
    found = used(
        make(layers=2),
        optimizer=optimizer,
        groups=[
            {"match": "blocks.1.up.*", "lr_scale": 3.0, "weight_decay": 0.25},
            {"match": "blocks.*", "lr_scale": 0.5},
            {"match": "*.bias", "lr_scale": 9.0, "weight_decay": 0.0},
        ],
    )
    assert found["blocks.1.up.weight"] == found["blocks.1.up.bias"] == (3.0, 0.25)
    assert found["blocks.0.up.weight"] == (0.5, 0.5)
    assert found["blocks.0.up.bias"] == (0.5, 0.0)
    assert found["output.bias"] == (9.0, 0.0)
    assert found["output.weight"] == (1.0, 0.5)


def test_groups_multiply_the_rates_of_layers():
    found = used(make(layers=2), layer_decay=0.5, groups=[{"match": "blocks.0.*", "lr_scale": 3.0}])
    assert (found["blocks.0.up.weight"][0], found["blocks.1.up.weight"][0]) == (0.75, 0.5)


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        used(make(), groups=[{"match": "blocks.*"}, {"match": "outptu.weight"}])
    assert "train.groups.1.match: 'outptu.weight' matches no parameter" in caught.value.message
    assert "did you mean 'output.weight'?" in caught.value.message


def test_nothing_left_to_train_is_refused():
    with pytest.raises(ConfigError, match="every parameter has a rate of 0"):
        used(make(), groups=[{"match": "*", "lr_scale": 0.0}])


@pytest.mark.parametrize("optimizer", plugins.OPTIMIZERS)
def test_frozen_parameters_have_no_gradient_and_no_state_and_do_not_move(optimizer, tmp_path):
    dataset = tiny_dataset(tmp_path / "d", "classify", rows=60)
    words = ["model.name=encoder", "model.dim=16", "model.ff=16", "distill.enabled=false", "train.threads=1",
             "train.max_steps=3", f"train.optimizer={optimizer}", "train.weight_decay=0.1",
             'train.groups=[{"match": "blocks.0.*", "lr_scale": 0}]']  # fmt: skip
    params = load(None, words)
    model = models.build(params.model, dataset.spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def look(*_: object) -> None:
        seen.append([name for name, parameter in model.named_parameters() if parameter.grad is None])

    fitted = fit(params, tasks.build(params, dataset), model, on_step=look)
    frozen = {name for name in before if name.startswith("blocks.0.")}
    assert all(set(names) == frozen for names in seen)
    same = {name for name, value in fitted.model.state_dict().items() if torch.equal(value, before[name])}
    assert same == frozen
    # It is the run that froze them: what is made of the model afterwards may train them.
    assert all(parameter.requires_grad for parameter in fitted.model.parameters())


TOTAL = 40
UP = {"schedule": "linear", "start": 0.1, "end": 1.0, "steps": 8}
FLAT = {"schedule": "constant", "steps": 0.25}
DOWN = {"schedule": "cosine", "start": 1.0, "end": 0.2}


def chained(phases: list[dict], total: int = TOTAL) -> list[float]:
    return [schedules.factor(step, total, Train(phases=phases)) for step in range(total)]


def theirs(make_schedulers, milestones: list[int]) -> list[float]:
    """The rates of a SequentialLR of torch's own."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torchs.SequentialLR(optimizer, make_schedulers(optimizer), milestones)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_phases_are_torchs_sequence_of_linear_constant_and_cosine():
    wanted = theirs(
        lambda optimizer: [
            torchs.LinearLR(optimizer, 0.1, 1.0, 8),
            torchs.ConstantLR(optimizer, 1.0, 10),
            torchs.CosineAnnealingLR(optimizer, TOTAL - 18, 0.2),
        ],
        [8, 18],
    )
    assert chained([UP, FLAT, DOWN]) == pytest.approx(wanted, abs=1e-9)


def test_phases_are_torchs_sequence_of_linear_and_exponential():
    ratio = 0.01 ** (1 / (TOTAL - 8))
    wanted = theirs(
        lambda optimizer: [torchs.LinearLR(optimizer, 0.1, 1.0, 8), torchs.ExponentialLR(optimizer, ratio)], [8]
    )
    assert chained([UP, {"schedule": "exponential", "start": 1.0, "end": 0.01}]) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("name", plugins.SCHEDULES)
def test_every_shape_leads_from_start_to_end(name):
    ends = {"start": 0.3, "end": 0.3} if name == "constant" else {"start": 0.3, "end": 0.9}
    found = chained([{**FLAT, "start": 0.5, "end": 0.5}, {"schedule": name, **ends}], total=1000)
    assert found[0] == 0.5
    assert found[250] == pytest.approx(0.3)
    assert found[-1] == pytest.approx(ends["end"], abs=0.01)
    assert all(0.3 - 1e-9 <= rate <= 0.9 + 1e-9 for rate in found[250:])


def test_a_run_shorter_than_its_phases_ends_within_one():
    assert chained([{**UP, "steps": 100}, DOWN], total=10) == pytest.approx([0.1 + 0.09 * step for step in range(10)])
    assert schedules.phase_ends(Train(phases=[{**UP, "steps": 8}, {**FLAT, "steps": 8}, DOWN]), 12) == [8, 12, 12]


WRONG = {
    "no steps before the last": ([{"start": 0.0}, DOWN], "phase 1 has no steps"),
    "steps in the last": ([UP, {**DOWN, "steps": 0.5}], "takes what is left"),
    "too large shares": ([{**UP, "steps": 0.6}, {**FLAT, "steps": 0.4}, DOWN], "sum to 1"),
    "constant that moves": ([UP, {"schedule": "constant", "start": 1.0, "end": 0.5}], "use linear"),
    "exponential to nothing": ([UP, {"schedule": "exponential", "end": 0.0}], "small factor"),
    "unknown shape": ([{"schedule": "cosin"}], "did you mean 'cosine'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_phases_that_do_not_fit_are_refused_with_the_reason(what):
    phases, reason = WRONG[what]
    with pytest.raises(ValueError, match=reason):
        Train(phases=phases)
