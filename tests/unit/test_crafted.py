"""Models and datasets that were made to do harm: opening them runs nothing, and says what they are not."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch

from tests.tiny import tiny_dataset
from tests.traps import as_array, as_pickle, as_weights
from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.errors import MillraceError

OPENED = {
    as_pickle: lambda file: pickle.load(file),
    as_array: lambda file: np.load(file, allow_pickle=True),
    as_weights: lambda file: torch.load(file, weights_only=False),
}


@pytest.mark.parametrize("made", OPENED)
def test_the_traps_are_traps(made, tmp_path):
    with contextlib.suppress(AttributeError, RuntimeError):  # torch.load misses a dictionary
        OPENED[made](io.BytesIO(made(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    place = tmp_path_factory.mktemp("good")
    dataset = tiny_dataset(place / "dataset", "classify", rows=60)
    params = load(None, ["model.name=encoder", "model.dim=16", "model.layers=1", "model.heads=2", "model.ff=16"])
    model = models.build(params.model, dataset.spec)
    models.save(place / "model", model, params.model, dataset.spec, dataset.labels, dataset.tokenizer_path, {})
    return place


@pytest.mark.parametrize("made", [as_weights, as_pickle])
@pytest.mark.parametrize("name", [models.WEIGHTS, models.CONFIG])
def test_a_crafted_model_runs_nothing(good, tmp_path, name, made):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    for path in (good / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(made(canary))
    with pytest.raises(MillraceError, match=name):
        models.load(folder)
    assert not canary.exists()


def opened(dataset: Dataset) -> object:
    """All that training reads."""
    return dataset.labels, tasks.build(load(None, []), dataset).batch("train", np.arange(4))


@pytest.mark.parametrize("made", [as_array, as_pickle])
@pytest.mark.parametrize("name", ["train/tokens.npy", "train/offsets.npy", "train/labels.npy", "labels.json"])
def test_a_crafted_dataset_runs_nothing(tmp_path, name, made):
    folder, canary = tmp_path / "dataset", tmp_path / "canary"
    meta = tiny_dataset(folder, "classify", rows=60).meta
    (folder / name).write_bytes(made(canary))
    # As one who can forge the digests too.
    (folder / "manifest.json").unlink()
    manifest.seal(folder, "dataset", meta, {})
    with pytest.raises(MillraceError, match=name):
        opened(Dataset(folder, verify=True))
    assert not canary.exists()
