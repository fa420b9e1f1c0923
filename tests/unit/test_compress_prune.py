"""Cubic magnitude pruning: the schedule, the exact share, and zeros that stay zero."""

import pytest
import torch
from torch import nn

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.compress.prune import Pruner, sparsity, sparsity_at
from trainer.compress.quantize_stage import prune
from trainer.config.load import validate
from trainer.config.stages import Prune
from trainer.models import Loaded

CONFIG = Prune(target=0.8, begin=0.1, end=0.6, every=1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def train(model, pruner, steps, total=100, first=1, rate=0.05):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    torch.manual_seed(1)
    for step in range(first, first + steps):
        loss = model(torch.randn(16, 20)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.on_step(step, total, model)
        yield step


def test_the_schedule_is_cubic_between_begin_and_end():
    shares = [sparsity_at(CONFIG, step, 100) for step in range(101)]
    assert shares[:11] == [0.0] * 11
    assert shares[35] == pytest.approx(0.8 * (1 - 0.5**3))
    assert shares[60:] == [0.8] * 41
    assert shares == sorted(shares)


def test_the_share_of_zeros_is_exact_and_follows_the_schedule():
    model = net()
    pruner = Pruner(CONFIG, model)
    for step in train(model, pruner, 100):
        assert sparsity(model) == pytest.approx(sparsity_at(CONFIG, step, 100), abs=1e-3)
    assert round(sparsity(model), 3) == 0.8


def test_a_pruned_weight_never_comes_back():
    model = net()
    pruner = Pruner(CONFIG, model)
    zeros = None
    for _ in train(model, pruner, 100):
        now = torch.cat([layer.weight.flatten() == 0 for layer in model if isinstance(layer, nn.Linear)])
        assert zeros is None or bool(now[zeros].all())
        zeros = now


def test_the_smallest_weights_go_and_biases_stay():
    model = net()
    before = model[0].weight.detach().abs().clone()
    with torch.no_grad():
        model[0].bias.fill_(1e-9)
    pruner = Pruner(Prune(target=0.5, begin=0.0, end=0.5, every=1, scope="tensor"), model)
    model(torch.randn(2, 20))
    pruner.on_step(50, 100, model)
    gone = model[0].weight == 0
    assert before[gone].max() <= before[~gone].min()
    assert bool((model[0].bias != 0).all())


def test_global_takes_from_where_weights_are_small_and_tensor_from_each():
    shares = {}
    for scope in ("global", "tensor"):
        model = net()
        with torch.no_grad():
            model[2].weight.mul_(100)
        pruner = Pruner(Prune(target=0.5, begin=0.0, end=0.5, scope=scope), model)
        model(torch.randn(2, 20))
        pruner.on_step(50, 100, model)
        shares[scope] = [float((layer.weight == 0).float().mean()) for layer in (model[0], model[2])]
    assert shares["tensor"] == pytest.approx([0.5, 0.5], abs=0.01)
    assert shares["global"][0] > 0.7
    assert shares["global"][1] < 0.05


def test_zeros_of_a_checkpoint_are_held():
    model = net()
    for _ in train(model, Pruner(CONFIG, model), 60):
        pass
    zeros = {name: weight == 0 for name, weight in model.named_parameters() if weight.dim() > 1}
    resumed = net()
    pruner = Pruner(CONFIG, resumed)  # made before the weights are loaded, as in a resumed run
    resumed.load_state_dict(model.state_dict())
    for _ in train(resumed, pruner, 5, first=61, rate=0.5):
        pass
    for name, weight in resumed.named_parameters():
        if weight.dim() > 1:
            assert bool((weight[zeros[name]] == 0).all())
            assert bool((weight[~zeros[name]] != 0).all())


def test_equal_weights_are_pruned_to_the_exact_number():
    model = nn.Sequential(nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    pruner = Pruner(Prune(target=0.3, begin=0.0, end=0.5), model)
    model(torch.randn(2, 10))
    pruner.on_step(50, 100, model)
    assert int((model[0].weight == 0).sum()) == 30


def test_fine_tuning_reaches_the_target_and_keeps_the_last_weights(tmp_path):
    dataset = tiny_dataset(tmp_path / "dataset", "classify", 200)
    tree = {"train": {"threads": 1, "batch_size": 16, "lr": 0.05}, "model": {"name": "ngram", "buckets": 128, "dim": 8}}
    params = validate(tree | {"quantize": {"prune": {"target": 0.75, "epochs": 3, "every": 2}}})
    task = tasks.build(params, dataset)
    torch.manual_seed(0)
    model = models.build(params.model, dataset.spec)
    history = prune(params, task, Loaded(model, params.model, dataset.spec, dataset.labels), tmp_path / "scratch")
    assert sparsity(model) == pytest.approx(0.75, abs=0.01)
    assert [row["step"] for row in history if "val_accuracy" in row] == [27]  # 140 rows of 16, three epochs
