"""`millrace checkpoint`: what it lists, what it finds damaged, and the model folder that it makes."""

from __future__ import annotations

import json
import shutil

import pytest

from pipelines.cli import main
from pipelines.dvcfile import OUT
from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.predict import Predictor
from trainer.train import checkpoint
from trainer.train.fit import fit
from trainer.train.state import seed_all

WORDS = ["train.threads=1", "train.max_steps=12", "train.eval_every=4", "train.checkpoint_every=4", "model.dim=8",
         "train.keep_checkpoints=9", "train.checkpoint_async=false", "train.lr=0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A scratch folder as a killed run leaves it, and the model that the run would have given."""
    folder = tmp_path_factory.mktemp("scratch")
    dataset = tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120)
    params = load(None, WORDS)
    seed_all(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARE", 1e9)
        fitted = fit(params, tasks.build(params, dataset), models.build(params.model, dataset.spec), scratch=folder)
    return folder, fitted


@pytest.fixture
def scratch(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "scratch")
    return tmp_path / "scratch"


def said(words, capsys, code=0) -> str:
    assert main(["checkpoint", *map(str, words)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err if code else captured.out


def damage(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_ls_shows_every_checkpoint_with_its_state(scratch, capsys):
    place = scratch / "train"
    (place / "step-000000004" / "state.json").write_text("{}")
    shutil.copytree(place / "step-000000008", place / ".tmp-step-000000016-1f")
    (place / "step-000000012").rename(place / "bad-step-000000012.1795312800")
    lines = said(["ls", scratch], capsys).splitlines()
    assert lines[0] == str(place)
    assert [line.split()[1] for line in lines[1:]] == ["4", "8", "12", "16"]
    assert "corrupted: state.json" in lines[1]
    assert "complete" in lines[2]
    assert "val_accuracy=" in lines[2]
    assert "put aside" in lines[3]
    assert "unfinished" in lines[4]
    assert said(["ls", place / "step-000000008"], capsys).splitlines()[1] == lines[2]


def test_ls_of_nothing_says_so(tmp_path, capsys):
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    assert "no checkpoints in" in capsys.readouterr().err


def test_verify_names_the_first_bad_file(scratch, capsys):
    assert said(["verify", scratch], capsys).count("every byte") == 3
    damage(scratch / "train/step-000000008/__0_0.distcp")
    assert "train/step-000000008/__0_0.distcp: corrupted" in said(["verify", scratch], capsys, 2)
    assert said(["verify", scratch, "--step", "4"], capsys).count("every byte") == 1


def test_without_a_place_it_is_where_a_run_on_this_machine_keeps_them(scratch, tmp_path, capsys, monkeypatch):
    shutil.copytree(scratch, tmp_path / "project" / OUT / ".scratch")
    monkeypatch.chdir(tmp_path / "project")
    assert said(["verify"], capsys).count("every byte") == 3
    assert len(said(["ls"], capsys).splitlines()) == 4


@pytest.mark.parametrize("words", [["verify"], ["verify", "--step", "5"], ["export", "--out", "m"]])
def test_nothing_there_is_an_error(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint" in said([words[0], tmp_path, *words[1:]], capsys, 2)


def test_export_gives_the_model_of_the_best_step(trained, scratch, tmp_path, capsys):
    out, fitted = tmp_path / "model", trained[1]
    assert f"the weights of step {fitted.best_step}" in said(["export", scratch, "--out", out], capsys)
    assert manifest.read(out, "model").meta["val"] == fitted.metrics
    weights = models.load(out).model.state_dict()
    assert all(bool((weights[name] == value).all()) for name, value in fitted.model.state_dict().items())
    assert len(Predictor(out).predict(["own0 word1"])) == 1
    assert main(["predict", "--model", str(out), "own1 word2"]) == 0
    assert "label" in json.loads(capsys.readouterr().out)


def test_export_of_a_step_replaces_a_model_but_nothing_else(scratch, tmp_path, capsys):
    out = tmp_path / "model"
    for step in (4, 12):
        assert f"the weights of step {step}" in said(["export", scratch, "--step", step, "--out", out], capsys)
    first = manifest.read(out, "model").digest
    assert "holds files that are no artifact" in said(["export", scratch, "--out", tmp_path], capsys, 2)
    other = tiny_dataset(tmp_path / "d", "classify", rows=40).folder
    assert "holds a dataset" in said(["export", scratch, "--out", other], capsys, 2)
    manifest.read(other, "dataset")
    damage(scratch / "train/step-000000012/__0_0.distcp")
    assert "corrupted" in said(["export", scratch, "--step", 12, "--out", out], capsys, 2)
    assert manifest.read(out, "model").digest == first


def test_of_several_runs_one_must_be_named(scratch, tmp_path, capsys):
    shutil.copytree(scratch / "train", scratch / "trial")
    assert "2 runs" in said(["export", scratch, "--out", tmp_path / "m"], capsys, 2)
    said(["export", scratch / "trial", "--out", tmp_path / "m"], capsys)
