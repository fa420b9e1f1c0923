"""Norms by block, and traces: as computed by hand, nothing where nothing is asked for, and no run ended by a failure."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.monitor import statistics
from trainer.monitor.statistics import block_of
from trainer.train.fit import fit
from trainer.train.state import seed_all

LR, CLIP = 0.5, 0.05
WORDS = [
    "task.name=classify", "model.name=encoder", "model.dim=16", "model.layers=2", "model.ff=16", "model.heads=2",
    "distill.enabled=false", "train.threads=1", "train.batch_size=16", "train.optimizer=sgd", "train.momentum=0",
    "train.weight_decay=0", "train.schedule=constant", f"train.lr={LR}", f"train.clip={CLIP}", "train.log_every=1",
    "model.dropout=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=100)


def train(dataset, scratch, *words, **hooks):
    params = load(None, [*WORDS, *words])
    seed_all(0)
    model = models.build(params.model, dataset.spec)
    return fit(params, tasks.build(params, dataset), model, scratch=scratch, **hooks)


def rows_of(scratch):
    rows = [json.loads(line) for line in (scratch / "train" / "live.jsonl").read_text().splitlines()]
    return [row for row in rows if any("/" in name for name in row)]


def test_statistics_are_the_norms_computed_by_hand(dataset, tmp_path):
    weights = {}

    def keep(step, _, model):
        weights[step] = {name: value.detach().clone() for name, value in model.named_parameters()}

    fitted = train(dataset, tmp_path, "train.max_steps=4", "train.statistics_every=2", on_step=keep)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    blocks = {block_of(name) for name in weights[1]}
    assert {"blocks.0", "blocks.1", "embedding"} <= blocks
    norms = {row["step"]: row["grad_norm"] for row in fitted.history if "grad_norm" in row}
    for row in rows:
        step = row["step"]
        before, after = weights[step - 1], weights[step]
        assert norms[step] > CLIP
        for block in blocks:
            old = torch.cat([value.flatten() for name, value in before.items() if block_of(name) == block])
            new = torch.cat([value.flatten() for name, value in after.items() if block_of(name) == block])
            weight, change = float(old.norm()), float((new - old).norm())
            assert row[f"weight_norm/{block}"] == pytest.approx(weight, rel=1e-5)
            assert row.get(f"update_ratio/{block}", 0.0) == pytest.approx(change / weight if weight else 0, rel=1e-5)
            # SGD: the change is the clipped gradient times the rate; the figure is of the gradient before it was clipped.
            gradient = change / LR * norms[step] / CLIP
            assert row[f"grad_norm/{block}"] == pytest.approx(gradient, rel=1e-3)
        whole = sum(value**2 for name, value in row.items() if name.startswith("grad_norm/")) ** 0.5
        assert whole == pytest.approx(norms[step], rel=1e-5)
    # The history, which the seed determines, and the weights are those of a run without.
    plain = train(dataset, None, "train.max_steps=4")
    assert plain.history == fitted.history
    assert all(torch.equal(value, fitted.model.state_dict()[name]) for name, value in plain.model.state_dict().items())


def test_without_statistics_nothing_is_computed(dataset, tmp_path, monkeypatch):
    monkeypatch.delattr(statistics, "measured")
    train(dataset, tmp_path, "train.max_steps=2")
    assert not rows_of(tmp_path)


def test_a_trace_has_the_steps_that_were_asked_for(dataset, tmp_path, capfd):
    place = tmp_path / "tracking"
    words = ["train.max_steps=6", "train.trace.start=3", "train.trace.steps=2", f"monitor.folder={place}"]
    fitted = train(dataset, None, *words)
    events = [event.get("name", "") for event in json.loads((place / "trace-rank-0.json").read_text())["traceEvents"]]
    assert sorted(name for name in set(events) if name.startswith("train step")) == ["train step 3", "train step 4"]
    assert sum(name.startswith("Optimizer.step#") for name in events) == 2
    assert {"aten::embedding", "aten::_foreach_add_"} <= set(events)
    assert any("Backward" in name for name in events)
    said = capfd.readouterr()
    assert said.out.count("trace-rank-0.json") == 1
    assert "ERROR" not in said.err
    assert fitted.history == train(dataset, None, "train.max_steps=6").history


def test_a_resumed_run_that_is_past_the_steps_has_no_trace_and_says_so(dataset, tmp_path, capsys):
    place = tmp_path / "tracking"

    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 4:
            raise Killed

    words = ["train.max_steps=6", "train.checkpoint_every=3", "train.trace.start=2", f"monitor.folder={place}"]
    with pytest.raises(Killed):
        # Three steps are asked for, and the run fails in their midst: nothing is written.
        train(dataset, tmp_path, *words, "train.trace.start=4", on_step=kill)
    assert not place.exists()
    train(dataset, tmp_path, *words)
    assert not place.exists()
    assert "did not come to step 2" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 9])
def test_a_trace_that_cannot_be_written_ends_no_run(dataset, tmp_path, steps, capsys):
    place = tmp_path / "file"
    place.write_text("in the way")
    words = ["train.max_steps=3", "train.trace.start=2", f"train.trace.steps={steps}", f"monitor.folder={place}"]
    assert train(dataset, None, *words).steps == 3
    assert "no trace of rank 0" in capsys.readouterr().out


def test_a_profiler_that_does_not_start_ends_no_run(dataset, tmp_path, monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("no permission")

    monkeypatch.setattr(torch.profiler.profile, "start", refuse)
    words = ["train.max_steps=4", "train.trace.start=2", f"monitor.folder={tmp_path}"]
    assert train(dataset, None, *words).steps == 4
    assert capsys.readouterr().out.count("no trace of rank 0: RuntimeError: no permission") == 1
