"""Predictor: the served file answers as the model does, whatever the batch."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_dataset
from trainer import models
from trainer.compress.export import export_onnx, serialise
from trainer.config.load import validate
from trainer.errors import ArtifactError, DataError
from trainer.predict import Predictor, served_bytes, softmax
from trainer.stage import execute

MODELS = {
    "classify": {"name": "ngram", "buckets": 512, "dim": 16},
    "lm": {"name": "decoder", "dim": 32, "heads": 2, "kv_heads": 1, "layers": 1, "ff": 32},
    "image": {"name": "cnn", "width": 8, "stages": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Trained models, each as torch/<task> and, with model.onnx, as onnx/<task>."""
    place = tmp_path_factory.mktemp("predict")
    for task, model in MODELS.items():
        dataset = tiny_dataset(place / "data" / task, task, 150)
        train = {"epochs": 6, "batch_size": 16, "threads": 1, "lr": 0.03}
        params = validate({"task": {"name": task}, "model": model, "train": train, "distill": {"enabled": False}})
        execute("train", params, {"dataset": str(dataset.folder)}, {"model": str(place / "torch" / task)})
        shutil.copytree(place / "torch" / task, place / "onnx" / task)
        loaded = models.load(place / "torch" / task)
        (place / "onnx" / task / "model.onnx").write_bytes(serialise(export_onnx(loaded.model, loaded.spec)))
    return place


TEXTS = ["own01 own02 own03 word3", "own30 own31 own32 own33", "", "word1", "own1 " * 300, "naïve \u200b 数据 \x00"]


def test_both_files_give_the_same_answers(folders):
    one, two = (Predictor(folders / kind / "classify", threads=1).predict(TEXTS) for kind in ("torch", "onnx"))
    assert [each["label"] for each in one] == [each["label"] for each in two]
    np.testing.assert_allclose([each["score"] for each in one], [each["score"] for each in two], atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_answer_does_not_depend_on_its_batch(folders, kind):
    predictor = Predictor(folders / kind / "classify", threads=1)
    together = predictor.predict(TEXTS, batch_size=64)
    alone = [predictor.predict([text])[0] for text in TEXTS]
    pairs = predictor.predict(TEXTS, batch_size=2)
    for one, two, three in zip(together, alone, pairs, strict=True):
        assert one["label"] == two["label"] == three["label"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)


def test_answers_are_probabilities_of_the_known_labels(folders):
    predictor = Predictor(folders / "onnx" / "classify", threads=1)
    answers = predictor.predict(TEXTS)
    assert len(answers) == len(TEXTS)
    for answer in answers:
        assert sorted(answer["scores"]) == sorted(predictor.labels)
        assert list(answer["scores"].values()) == sorted(answer["scores"].values(), reverse=True)
        assert sum(answer["scores"].values()) == pytest.approx(1.0, abs=1e-4)
        assert answer["scores"][answer["label"]] == max(answer["scores"].values()) == answer["score"]
    assert answers[0]["label"] == "label-0"
    assert answers[1]["label"] == "label-3"
    assert predictor.predict([]) == []


def test_texts_are_encoded_as_in_the_dataset(folders):
    from trainer.artifacts.dataset import Dataset

    split = Dataset(folders / "data" / "classify").split("test")
    predictor = Predictor(folders / "torch" / "classify")
    for index, text in enumerate(split.texts()[:5]):
        stored = split.tokens[split.offsets[index] : split.offsets[index + 1]]
        row = predictor.encode([text])[0]
        width = min(len(stored), predictor.spec.max_length)
        assert row[:width].tolist() == stored[:width].tolist()
        assert not row[width:].any()
    assert predictor.encode(["own1 " * 300]).shape == (1, 48)
    assert predictor.encode([""]).shape[1] >= 1


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 48])
def test_any_width_of_tokens_is_taken(folders, kind, length):
    predictor = Predictor(folders / kind / "classify", threads=1)
    tokens = np.full((2, length), 5)
    wide = np.pad(tokens, ((0, 0), (0, 48 - length)))
    np.testing.assert_allclose(predictor.logits(tokens), predictor.logits(wide), atol=1e-5)


def test_completions_are_the_same_each_time_and_bounded(folders):
    predictor = Predictor(folders / "onnx" / "lm", threads=1)
    one, two = (predictor.predict(["def alpha("], max_new_tokens=12)[0] for _ in range(2))
    assert one == two
    assert one["text"] == "def alpha("
    assert one["completion"]
    assert len(predictor.tokenizer.encode(predictor.complete("x", max_new_tokens=3)).ids) <= 4
    assert predictor.complete("x", max_new_tokens=0) == ""
    longer = predictor.complete("def beta(gamma):\n" * 40, max_new_tokens=4)  # more than the model sees at once
    assert isinstance(longer, str)


def test_completions_of_both_files_agree(folders):
    one, two = (
        Predictor(folders / kind / "lm", threads=1).complete("def ", max_new_tokens=10) for kind in ("torch", "onnx")
    )
    assert one == two


def test_sampling_follows_its_seed(folders):
    predictor = Predictor(folders / "onnx" / "lm", threads=1)
    made = [predictor.complete("def ", max_new_tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert made[0] == made[1]
    assert len(set(made)) > 1


def test_pictures_of_any_size_and_mode_are_taken(folders, tmp_path):
    predictor = Predictor(folders / "onnx" / "image", threads=1)
    paths = []
    for index, (mode, size) in enumerate([("RGB", (33, 20)), ("L", (8, 8)), ("RGBA", (8, 8)), ("P", (9, 9))]):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.new(mode, size, 60 if mode in "LP" else (60, 60, 60, 255)[: len(mode)]).save(paths[-1])
    assert len(predictor.predict(paths)) == 4


def test_a_picture_of_the_dataset_is_read_as_the_dataset_holds_it(folders, tmp_path):
    from trainer.artifacts.dataset import Dataset
    from trainer.predict import load_pictures

    images = Dataset(folders / "data" / "image").split("test").images
    Image.fromarray(np.asarray(images[0, 0])).save(tmp_path / "one.png")
    spec = Predictor(folders / "torch" / "image").spec
    np.testing.assert_array_equal(load_pictures([str(tmp_path / "one.png")], spec)[0], images[0] / np.float32(255))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_named(folders, tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png: not a picture"):
        Predictor(folders / "torch" / "image").predict([str(tmp_path / "x.png")])


BROKEN = {
    "half a file": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no ONNX": lambda content: b"\x80\x04K\x01." * 100,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_an_error_that_names_the_file(folders, tmp_path, case):
    folder = tmp_path / "model"
    shutil.copytree(folders / "onnx" / "classify", folder)
    (folder / "model.onnx").write_bytes(BROKEN[case]((folder / "model.onnx").read_bytes()))
    with pytest.raises(ArtifactError, match=r"model\.onnx: not readable as ONNX"):
        Predictor(folder)


def test_a_folder_without_a_model_is_an_error(folders, tmp_path):
    with pytest.raises(ArtifactError, match="holds neither"):
        Predictor(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(folders / "torch" / "classify", folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Predictor(folder).predict(["x"])


def test_the_served_file_is_the_one_whose_bytes_count(folders):
    torch_folder, onnx_folder = folders / "torch" / "image", folders / "onnx" / "image"
    assert served_bytes(torch_folder) == (torch_folder / "model.safetensors").stat().st_size
    assert served_bytes(onnx_folder) == (onnx_folder / "model.onnx").stat().st_size


def test_threads_of_torch_are_set_for_the_predictor(folders):
    before = torch.get_num_threads()
    try:
        Predictor(folders / "torch" / "classify", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_softmax_of_large_numbers_is_finite():
    found = softmax(np.asarray([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [[1, 0, 0], [1 / 3] * 3], atol=1e-12)
