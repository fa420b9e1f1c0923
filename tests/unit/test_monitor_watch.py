"""Figures of speed: what is counted, what is left out, and MFU, which is unknown rather than a guess."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts.dataset import Spec
from trainer.config.load import load
from trainer.monitor import utilisation, watch
from trainer.monitor.watch import Watch

DECODER = [
    "task.name=lm", "model.name=decoder", "model.dim=32", "model.layers=3", "model.ff=48", "model.heads=4",
    "model.kv_heads=2", "distill.enabled=false",
]  # fmt: skip
CPU = torch.device("cpu")


class Clock:
    """A clock that goes on when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Kept:
    def __init__(self):
        self.rows = []

    def row(self, step, figures):
        self.rows.append(dict(figures))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    dataset = tiny_dataset(tmp_path_factory.mktemp("lm") / "d", "lm", rows=60)
    return tasks.build(load(None, DECODER), dataset)


def watch_of(task, size=1):
    params = load(None, DECODER)
    model = models.build(params.model, task.spec)
    kept = Kept()
    return Watch(task, model, params.train, CPU, size, [kept]), kept.rows, model


def test_speed_is_of_the_time_of_training_alone(task, clock):
    made, rows, _ = watch_of(task)
    for _ in range(4):
        with made.part("data"):
            clock.now += 0.5
        clock.now += 1.5
        made.step(100.0)
    with made.part("evaluate"):
        clock.now += 50.0
    with made.part("checkpoint"):
        clock.now += 2.0
    made.row({"step": 4, "val_loss": 1.0})
    made.row({"step": 4, "train_loss": 1.0})
    assert rows[0] == {"val_loss": 1.0}
    assert rows[1]["tokens_per_s"] == pytest.approx(40.0)
    assert rows[1]["step_ms"] == pytest.approx(2500.0)
    assert rows[1]["data_wait"] == pytest.approx(0.2)
    assert rows[1]["checkpoint_s"] == pytest.approx(2.0)
    clock.now += 1.0
    made.step(10.0)
    made.row({"step": 5, "train_loss": 1.0})
    assert rows[2]["tokens_per_s"] == pytest.approx(10.0)
    assert rows[2]["data_wait"] == rows[2]["checkpoint_s"] == 0.0


def test_mfu_is_the_arithmetic_over_the_peak_of_all_ranks(task, clock, monkeypatch):
    made, rows, model = watch_of(task, size=2)
    monkeypatch.setattr(utilisation, "known_peak", lambda *_: 1e9)
    clock.now += 2.0
    made.step(1000.0)
    made.row({"step": 1, "train_loss": 1.0})
    flops = utilisation.flops_per_token(model, task.spec.max_length)
    assert rows[0]["mfu"] == pytest.approx(flops * 500.0 / 2e9)


def test_a_cpu_is_measured_once_and_only_for_a_run_that_lasts(task, clock, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(utilisation.gpus, "measured_peak", lambda precision: calls.append(precision) or 5e9)
    made, rows, _ = watch_of(task)
    for _ in range(3):
        clock.now += 20.0
        made.step(10.0)
        made.row({"step": 1, "train_loss": 1.0})
    assert ["mfu" in row for row in rows] == [False, True, True]
    assert calls == ["fp32"]
    again, rows, _ = watch_of(task)
    clock.now += 1.0
    again.step(10.0)
    again.row({"step": 1, "train_loss": 1.0})
    assert "mfu" in rows[0]
    assert calls == ["fp32"]
    assert list(json.loads((tmp_path / "millrace" / "peak.json").read_text()).values()) == [5e9]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}'])
def test_broken_notes_of_a_peak_are_no_peak(content, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "millrace").mkdir()
    (tmp_path / "millrace" / "peak.json").write_text(content)
    assert utilisation.known_peak(CPU, "fp32") is None


def test_an_unknown_gpu_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "ACME 9000")
    assert utilisation.known_peak(torch.device("cuda"), "bf16") is None


@pytest.mark.parametrize(("tied", "bigrams"), [("true", 0), ("false", 0), ("true", 50)])
def test_flops_per_token_are_those_that_torch_counts(tied, bigrams):
    params = load(None, [*DECODER, f"model.tie_embeddings={tied}", f"model.bigrams={bigrams}", "model.dropout=0"])
    model = models.build(params.model, Spec("lm", vocab_size=300, max_length=64))
    tokens = torch.randint(0, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    forward = next(flops for op, flops in counted.items() if "attention" in op and "backward" not in op)
    # Its backward pass of attention counts one product that is computed a second time: 5 instead of 4.
    counted_once = sum(flops for op, flops in counted.items() if "attention" not in op) + 3 * forward
    gains = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert utilisation.flops_per_token(model, 64) - gains == pytest.approx(counted_once / tokens.numel())


def test_a_frozen_weight_costs_two_products_instead_of_three(task):
    _, _, model = watch_of(task)
    before = utilisation.flops_per_token(model, 16)
    frozen = model.blocks[0].up.weight
    frozen.requires_grad_(False)
    assert before - utilisation.flops_per_token(model, 16) == 2 * frozen.numel()


def test_models_that_are_no_stack_of_blocks_have_no_mfu():
    params = load(None, ["task.name=image", "model.name=cnn", "data.image_size=8", "distill.enabled=false"])
    model = models.build(params.model, Spec("image", num_labels=2, image_size=8, image_channels=1))
    assert utilisation.flops_per_token(model, 64) is None
