"""Temperature scaling: the right temperature, the same labels, better probabilities."""

import copy
import json

import numpy as np
import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.compress.calibrate import BOUNDS, calibrate, fit
from trainer.config.load import validate
from trainer.evaluate.metrics import calibration
from trainer.predict import Predictor
from trainer.stage import execute


def drawn(temperature: float, rows: int = 20_000, labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 2.0, (rows, labels))
    noise = rng.gumbel(size=(rows, labels))
    return logits, (logits / temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    assert fit(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_a_model_that_is_always_right_or_knows_nothing_stays_within_bounds():
    logits = np.eye(3)[np.arange(30) % 3]
    assert fit(logits, np.arange(30) % 3) == pytest.approx(BOUNDS[0], rel=1e-3)
    assert fit(logits, (np.arange(30) + 1) % 3) == pytest.approx(BOUNDS[1], rel=1e-3)
    assert np.isfinite(fit(logits * 1e4, np.arange(30) % 3))


def test_scaling_changes_probabilities_but_no_label(tmp_path):
    dataset = tiny_dataset(tmp_path / "dataset", "classify", 200)
    params = validate({"model": {"name": "ngram", "buckets": 256, "dim": 8}, "distill": {"enabled": False}})
    task = tasks.build(params, dataset)
    torch.manual_seed(0)
    model = models.build(params.model, task.spec).eval()
    with torch.no_grad():
        model.output.weight.mul_(40.0)  # far too sure of itself
    before = copy.deepcopy(model)
    found = calibrate(task, model)
    assert found > 1.5
    batch = task.batch("val", np.arange(task.num_examples("val")))
    with torch.no_grad():
        old, new = before(batch["inputs"]), model(batch["inputs"])
    assert torch.equal(old.argmax(1), new.argmax(1))
    assert torch.allclose(old / found, new, atol=1e-4)
    assert task.evaluate(model, "val")["loss"] < task.evaluate(before, "val")["loss"]
    assert calibrate(task, model) == pytest.approx(1.0, abs=0.01)
    targets = batch["targets"].numpy()
    errors = [calibration(targets, torch.softmax(logits, 1).numpy(), 10)[0] for logits in (old, new)]
    assert errors[1] < errors[0]


def test_the_served_model_is_calibrated_unless_it_is_switched_off(tmp_path):
    tiny_dataset(tmp_path / "dataset", "classify", 200)
    dataset = str(tmp_path / "dataset")
    values = {"model": {"name": "ngram", "buckets": 256, "dim": 8}, "train": {"epochs": 1, "threads": 1}}
    values |= {"distill": {"enabled": False}, "task": {"name": "classify"}}
    execute("train", validate(values), {"dataset": dataset}, {"model": str(tmp_path / "model")})
    logits = {}
    for wanted in (True, False):
        out = tmp_path / f"quantized-{wanted}"
        params = validate(values | {"quantize": {"temperature": wanted, "torchao": False, "enabled": False}})
        given = {"dataset": dataset, "student": str(tmp_path / "model")}
        execute("quantize", params, given, {"quantized": str(out)})
        predictor = Predictor(out)
        logits[wanted] = predictor.logits(predictor.encode(["alpha beta", "gamma"]))
    temperature = json.loads((tmp_path / "quantized-True" / "manifest.json").read_text())["meta"]["temperature"]
    assert temperature != 1.0
    assert np.allclose(logits[True] * temperature, logits[False], rtol=1e-3, atol=1e-4)


def test_a_language_model_is_left_as_it_is(tmp_path):
    params = validate(
        {"task": {"name": "lm"}, "model": {"name": "decoder", "dim": 16, "ff": 32, "layers": 1, "heads": 2},
         "distill": {"enabled": False}}
    )  # fmt: skip
    task = tasks.build(params, tiny_dataset(tmp_path / "dataset", "lm", 60))
    model = models.build(params.model, task.spec).eval()
    before = copy.deepcopy(model.state_dict())
    assert calibrate(task, model) == 1.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
