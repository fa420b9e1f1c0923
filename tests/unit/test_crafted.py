"""Models and datasets that were made to do harm: opening them runs nothing, and says what they are not."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.errors import MillraceError


class Trap:
    """Unpickled, it leaves a canary."""

    def __init__(self, canary) -> None:
        self.canary = canary

    def __reduce__(self):
        return (exec, (f"open({str(self.canary)!r}, 'w').close()",))


def as_array(canary) -> bytes:
    """An .npy of objects, which numpy keeps as a pickle."""
    made = io.BytesIO()
    np.save(made, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    return made.getvalue()


def as_weights(canary) -> bytes:
    """A file as torch.save writes them."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap(canary)))
        file.writestr("archive/version", "3\n")
    return made.getvalue()


def as_pickle(canary) -> bytes:
    return pickle.dumps(Trap(canary))


def test_the_traps_are_traps(tmp_path):
    for number, made in enumerate((as_pickle, as_array)):
        canary = tmp_path / str(number)
        if made is as_pickle:
            pickle.loads(made(canary))
        else:
            np.load(io.BytesIO(made(canary)), allow_pickle=True)
        assert canary.exists()


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
