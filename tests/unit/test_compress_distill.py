"""Distillation: the loss is Hinton's, and a teacher that does not fit is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.compress.distill import Distilled, Ensemble
from trainer.config.load import validate
from trainer.config.stages import Distill
from trainer.errors import ArtifactError
from trainer.stage import execute

TREE = {
    "model": {"name": "ngram", "buckets": 256, "dim": 16},
    "train": {"epochs": 6, "batch_size": 32, "threads": 1, "lr": 0.03},
    "distill": {"student": {"name": "ngram", "buckets": 128, "dim": 8}, "temperature": 2.0, "alpha": 0.7},
}
DECODER = {"name": "decoder", "dim": 16, "heads": 2, "kv_heads": 1, "layers": 1, "ff": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset and a teacher trained on it."""
    place = tmp_path_factory.mktemp("distill")
    tiny_dataset(place / "dataset", "classify", 300)
    execute("train", validate(TREE), {"dataset": str(place / "dataset")}, {"model": str(place / "model")})
    return place


def distil(place, out, teacher="model", **changes):
    params = validate(TREE | {"distill": TREE["distill"] | changes})
    ports = {"dataset": str(place / "dataset"), "model": str(place / teacher)}
    return execute("distill", params, ports, {"student": str(out)})


def built(tmp_path, name="classify", model=None, **distill):
    dataset = tiny_dataset(tmp_path / name, name, 60)
    params = validate({"task": {"name": name}, "model": model or TREE["model"], "distill": {"enabled": False}})
    base = tasks.build(params, dataset)
    torch.manual_seed(0)
    made = [models.build(params.model, dataset.spec).eval() for _ in range(3)]
    config = Distill(**({"temperature": 3.0, "alpha": 0.6} | distill))
    return base, made, config


def test_the_loss_is_the_weighted_sum_with_t_squared(tmp_path):
    base, (teacher, student, _), config = built(tmp_path)
    task = Distilled(base, Ensemble([teacher], [1.0], [None]), config)
    batch = task.batch("train", np.arange(7))
    found = task.losses(student, batch)
    logits, wanted = student(batch["inputs"]), teacher(batch["inputs"])
    hard = cross_entropy(logits, batch["targets"], reduction="sum")
    p = torch.softmax(wanted / 3.0, -1)
    q = torch.softmax(logits / 3.0, -1)
    soft = (p * (p / q).log()).sum()
    torch.testing.assert_close(found["cross_entropy"], 0.4 * hard)
    torch.testing.assert_close(found["distillation"], 0.6 * 9.0 * soft)


def test_alpha_zero_is_the_task_and_alpha_one_ignores_the_labels(tmp_path):
    base, (teacher, student, _), config = built(tmp_path, alpha=0.0)
    batch = base.batch("train", np.arange(9))
    plain = Distilled(base, Ensemble([teacher], [1.0], [None]), config).losses(student, batch)
    assert plain.keys() == {"cross_entropy"}
    torch.testing.assert_close(plain["cross_entropy"], base.losses(student, batch)["cross_entropy"])
    only = Distilled(base, Ensemble([teacher], [1.0], [None]), config=Distill(alpha=1.0)).losses(student, batch)
    assert only.keys() == {"distillation"}


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(tmp_path):
    base, (teacher, _, _), config = built(tmp_path)
    task = Distilled(base, Ensemble([teacher], [1.0], [None]), config)
    assert abs(float(task.losses(teacher, task.batch("train", np.arange(9)))["distillation"].detach())) < 1e-5


def test_what_was_asked_before_training_is_what_is_asked_on_the_fly(tmp_path):
    base, (teacher, student, other), config = built(tmp_path)
    task = Distilled(base, Ensemble([teacher, other], [0.3, 0.7], [None, None]), config)
    index = np.asarray([30, 2, 17, 5])
    known = task.batch("train", index)
    assert known["teacher"].shape == (4, 4)
    fresh = {name: value for name, value in known.items() if name != "teacher"}
    torch.testing.assert_close(task.losses(student, known)["distillation"], task.losses(student, fresh)["distillation"])


def test_an_ensemble_is_the_weighted_mean_of_distributions(tmp_path):
    base, (one, two, _), _ = built(tmp_path)
    batch = base.batch("val", np.arange(5))
    mean = Ensemble([one, two], [0.25, 0.75], [None, None]).distribution(base, batch, 2.0)
    parts = [torch.softmax(model(batch["inputs"]) / 2.0, -1) for model in (one, two)]
    torch.testing.assert_close(mean, 0.25 * parts[0] + 0.75 * parts[1])
    torch.testing.assert_close(mean.sum(-1), torch.ones(5))


def test_a_teacher_with_its_labels_in_another_order_is_put_right(tmp_path):
    base, (teacher, _, _), _ = built(tmp_path)
    batch = base.batch("val", np.arange(5))
    straight = Ensemble([teacher], [1.0], [None]).distribution(base, batch, 1.0)
    order = [2, 0, 3, 1]
    found = Ensemble([teacher], [1.0], [order]).distribution(base, batch, 1.0)
    torch.testing.assert_close(found, straight[:, order])


def test_pictures_are_shown_to_the_teacher_as_the_student_sees_them(tmp_path):
    base, (teacher, student, _), config = built(tmp_path, "image", {"name": "cnn", "width": 4, "stages": 1})
    task = Distilled(base, Ensemble([teacher], [1.0], [None]), config)
    batch = task.batch("train", np.arange(6))
    assert "teacher" not in batch
    moved = task.augment(batch, np.random.default_rng(0))
    wanted = torch.softmax(teacher(moved["inputs"]) / 3.0, -1)
    given = moved | {"teacher": wanted}
    torch.testing.assert_close(task.losses(student, moved)["distillation"], task.losses(student, given)["distillation"])


def test_a_language_model_learns_nothing_at_positions_without_a_target(tmp_path):
    base, (teacher, student, _), config = built(tmp_path, "lm", DECODER)
    task = Distilled(base, Ensemble([teacher], [1.0], [None]), config)
    batch = task.batch("train", np.asarray([0]))
    batch["targets"][:, 5:] = -100
    logits, wanted = student(batch["inputs"])[:, :5] / 3.0, teacher(batch["inputs"])[:, :5] / 3.0
    p, q = torch.softmax(wanted, -1), torch.softmax(logits, -1)
    torch.testing.assert_close(task.losses(student, batch)["distillation"], 0.6 * 9.0 * (p * (p / q).log()).sum())


def test_no_gradient_reaches_the_teacher(tmp_path):
    base, (teacher, student, _), config = built(tmp_path, "lm", DECODER)
    task = Distilled(base, Ensemble([teacher], [1.0], [None]), config)
    sum(task.losses(student, task.batch("train", np.asarray([0]))).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_a_student_learns_from_its_teacher_alone(place, tmp_path):
    result = distil(place, tmp_path / "student", alpha=1.0, epochs=12, lr=0.1)
    figures = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert figures["student"]["val_accuracy"] > 0.6
    assert figures["teacher"]["val_accuracy"] == pytest.approx(models_metric(place / "model"), abs=1e-9)
    assert result.metrics["parameters_ratio"] == figures["num_parameters"]["ratio"] < 0.5
    assert models.load(tmp_path / "student").config.dim == 8


def models_metric(folder) -> float:
    return json.loads((folder / "metrics.json").read_text())["val_accuracy"]


def test_distilling_again_gives_the_same_digest(place, tmp_path):
    for out in ("one", "two"):
        distil(place, tmp_path / out, epochs=1)
    assert manifest.read(tmp_path / "one").digest == manifest.read(tmp_path / "two").digest


def test_further_teachers_join_with_their_weights(place, tmp_path):
    distil(place, tmp_path / "student", epochs=1, teachers=[str(place / "model")], weights=[3.0, 1.0])
    figures = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert [each["name"] for each in figures["teachers"]] == ["the trained model", str(place / "model")]


def test_distillation_that_is_off_passes_the_model_on(place, tmp_path):
    distil(place, tmp_path / "student", enabled=False)
    same = ("model.safetensors", "config.json", "tokenizer.json", "README.md")
    for name in same:
        assert (tmp_path / "student" / name).read_bytes() == (place / "model" / name).read_bytes()


def altered_teacher(place, tmp_path, change) -> str:
    folder = tmp_path / "teacher"
    shutil.copytree(place / "model", folder)
    (folder / "manifest.json").unlink()
    change(folder)
    manifest.seal(folder, "model", {}, {})
    return str(folder)


def rename_label(folder):
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["2"] = "somewhere"
    (folder / "config.json").write_text(json.dumps(config))


def other_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


UNFIT = {
    "another label": (rename_label, r"it lacks 'label-2' and the dataset lacks 'somewhere'"),
    "another tokenizer": (other_tokenizer, "its tokenizer is not the dataset's"),
    "no tokenizer": (no_tokenizer, "its tokenizer is not the dataset's"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_teacher_that_does_not_fit_is_refused(place, tmp_path, case):
    change, message = UNFIT[case]
    uri = altered_teacher(place, tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        distil(place, tmp_path / "student", teachers=[uri])
    assert not (tmp_path / "student").exists()


def test_a_teacher_of_another_task_is_refused(place, tmp_path):
    tiny_dataset(tmp_path / "pictures", "image", 60)
    params = validate(
        {
            "task": {"name": "image"},
            "model": {"name": "cnn", "width": 4, "stages": 1},
            "train": {"epochs": 1},
            "distill": {"enabled": False},
        }
    )
    execute("train", params, {"dataset": str(tmp_path / "pictures")}, {"model": str(tmp_path / "cnn")})
    with pytest.raises(ArtifactError, match="learned task 'image', the dataset is for 'classify'"):
        distil(place, tmp_path / "student", teachers=[str(tmp_path / "cnn")])


def test_a_teacher_with_one_flipped_byte_is_refused(place, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(place / "model", folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactError, match="corrupted"):
        distil(place, tmp_path / "student", teachers=[str(folder)])


def test_the_validation_split_has_no_teacher(tmp_path):
    base, (teacher, _, _), config = built(tmp_path)
    task = Distilled(base, Ensemble([teacher], [1.0], [None]), config)
    assert "teacher" not in task.batch("val", np.arange(3))
    assert task.evaluate(teacher, "val") == base.evaluate(teacher, "val")
    assert isinstance(task.dataset, Dataset)
