"""Stage `distill`: teach a small student what the trained model, or an ensemble with it, knows.

The student folder is a model folder with history.jsonl and distillation.json: the teachers' and the student's metrics
on the validation split and the sizes of both, measured right after.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import storage
from trainer.artifacts import manifest
from trainer.artifacts.card import write_model_card
from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.config.load import with_values
from trainer.errors import ArtifactError
from trainer.log import say
from trainer.stage import Call, Result

if TYPE_CHECKING:
    from trainer.compress.distill import Ensemble
    from trainer.models import Loaded


@dataclass(frozen=True)
class Teacher:
    """A teacher: where it came from, its model, and the digest of its artifact."""

    name: str
    loaded: Loaded
    digest: str


def run(call: Call) -> Result:
    """Distil, or pass the model on where `distill.enabled` is false.

    Raises:
        ArtifactError: a teacher does not fit the dataset: another task, tokenizer or set of labels.
        StorageError: a teacher's URI cannot be read.
    """
    params, out = call.params, call.outputs["student"]
    if not params.distill.enabled:
        say("distill: off, the trained model is passed on")
        copy_model(call.inputs["model"], out)
        found = manifest.read(call.inputs["model"], verify=False)
        return Result(_metrics_of(out), {"student": found.meta})
    from trainer import models, tasks
    from trainer.compress.distill import Distilled
    from trainer.train.fit import fit
    from trainer.train.state import history_lines, seed_all

    dataset = Dataset(call.inputs["dataset"])
    config = student_params(params)
    base = tasks.build(config, dataset)
    teachers = load_teachers(params, dataset, call.inputs["model"], call.scratch)
    ensemble = _ensemble(params, dataset, teachers)
    task = Distilled(base, ensemble, params.distill)
    seed_all(config.train.seed)
    student = models.build(config.model, dataset.spec)
    size = models.num_parameters(student)
    largest = max(models.num_parameters(teacher.loaded.model) for teacher in teachers)
    say(f"distill {config.model.name}: {size:,} parameters, {size / largest:.1%} of the teacher's {largest:,}")
    # A killed run goes on only with the same teachers; the first one is part of the scratch folder's name already.
    others = hashlib.sha256("".join(each.digest for each in teachers).encode()).hexdigest()[:12]
    fitted = fit(config, task, student, scratch=call.scratch / others, what="distill")
    teacher_metrics = {f"val_{name}": value for name, value in _evaluate(base, ensemble).items()}
    tokenizer = dataset.tokenizer_path if dataset.tokenizer_path.is_file() else None
    models.save(out, fitted.model, config.model, dataset.spec, dataset.labels, tokenizer, fitted.metrics)
    key = f"val_{base.metric}"
    ratio = _share(fitted.metrics[key], teacher_metrics[key], base.direction)
    comparison = {
        "metric": key,
        "teacher": teacher_metrics,
        "student": fitted.metrics,
        "share_of_teacher": ratio,
        "num_parameters": {"teacher": largest, "student": size, "ratio": size / largest},
        "teachers": [{"name": each.name, "digest": each.digest} for each in teachers],
    }
    storage.write_json(out / "distillation.json", comparison)
    (out / "history.jsonl").write_text(history_lines(fitted.history), encoding="utf-8")
    sections = {
        "task": params.task.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "distill": params.distill.model_dump(mode="json"),
    }
    note = (
        f"The student has {size:,} parameters, {size / largest:.1%} of its teacher's, and reaches {ratio:.1%} of its "
        f"{key}: {fitted.metrics[key]:.4f} against {teacher_metrics[key]:.4f}."
    )
    names = ", ".join(each.name for each in teachers)
    title = f"{config.model.name} {params.task.name} student"
    write_model_card(
        out,
        title=title,
        dataset=dataset,
        metrics=fitted.metrics,
        params=sections,
        made_by="distill",
        base=names,
        notes=note,
    )
    say(
        "distilled",
        **{f"student_{key}": fitted.metrics[key], f"teacher_{key}": teacher_metrics[key]},
        share_of_teacher=ratio,
        parameters_ratio=size / largest,
    )
    meta = {
        "task": params.task.name,
        "num_parameters": size,
        "data_version": dataset.meta.get("data_version", ""),
        "val": fitted.metrics,
        "teacher_val": teacher_metrics,
        "parameters_ratio": size / largest,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
    }
    figures = {**fitted.metrics, f"teacher_{key}": teacher_metrics[key], "parameters_ratio": size / largest}
    return Result(figures, {"student": meta})


def student_params(params: Params) -> Params:
    """The configuration of the student's training."""
    # The space may name keys that the student's family does not have.
    values: dict[str, Any] = {"model": params.distill.student.model_dump(mode="json"), "tune.space": {}}
    if params.distill.epochs:
        values["train.epochs"] = params.distill.epochs
    if params.distill.lr:
        values["train.lr"] = params.distill.lr
    return with_values(params, values)


def load_teachers(params: Params, dataset: Dataset, model: Path, cache: Path) -> list[Teacher]:
    """The trained model and the further teachers, each checked against the dataset.

    Raises:
        ArtifactError: an artifact is corrupted, or does not fit the dataset.
    """
    from trainer import models

    found = []
    for index, uri in enumerate((str(model), *params.distill.teachers)):
        folder = model if index == 0 else storage.fetch(uri, cache / "teachers" / str(index))
        digest = manifest.read(folder, "model").digest
        loaded = models.load(folder)
        name = "the trained model" if index == 0 else uri
        check_teacher(name, loaded, folder, dataset)
        found.append(Teacher(name, loaded, digest))
    return found


def check_teacher(name: str, loaded: Loaded, folder: Path, dataset: Dataset) -> None:
    """Raise ArtifactError if a teacher's task, labels, tokens or pictures are not the dataset's."""
    spec, mine = loaded.spec, dataset.spec
    fix = "use a teacher that was trained on this dataset, or preprocess again with the teacher's tokenizer and labels"
    if spec.task != mine.task:
        raise ArtifactError(f"teacher {name}: learned task {spec.task!r}, the dataset is for {mine.task!r}", fix)
    if sorted(loaded.labels) != sorted(dataset.labels):
        theirs, ours = set(loaded.labels), set(dataset.labels)
        parts = []
        if ours - theirs:
            parts.append(f"it lacks {_few(ours - theirs)}")
        if theirs - ours:
            parts.append(f"the dataset lacks {_few(theirs - ours)}")
        raise ArtifactError(f"teacher {name}: its labels are not the dataset's: {' and '.join(parts)}", fix)
    if (spec.image_size, spec.image_channels) != (mine.image_size, mine.image_channels):
        theirs_size = f"{spec.image_channels} x {spec.image_size} x {spec.image_size}"
        raise ArtifactError(
            f"teacher {name}: takes pictures of {theirs_size}, the dataset's are "
            f"{mine.image_channels} x {mine.image_size} x {mine.image_size}",
            fix,
        )
    own, ours_path = folder / "tokenizer.json", dataset.tokenizer_path
    if ours_path.is_file() and (
        spec.vocab_size != mine.vocab_size
        or not own.is_file()
        or manifest.sha256_file(own) != manifest.sha256_file(ours_path)
    ):
        raise ArtifactError(f"teacher {name}: its tokenizer is not the dataset's", fix)


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder's files, without its manifest."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != storage.MANIFEST:
            shutil.copyfile(path, target / path.name)


def _ensemble(params: Params, dataset: Dataset, teachers: list[Teacher]) -> Ensemble:
    from trainer.compress.distill import Ensemble

    weights = params.distill.weights or (1.0,) * len(teachers)
    orders: list[list[int] | None] = []
    for teacher in teachers:
        theirs = teacher.loaded.labels
        place = {label: number for number, label in enumerate(theirs)}
        orders.append(None if theirs == dataset.labels else [place[label] for label in dataset.labels])
    shares = [weight / sum(weights) for weight in weights]
    return Ensemble([teacher.loaded.model for teacher in teachers], shares, orders)


def _evaluate(base: Any, ensemble: Ensemble) -> dict[str, float]:
    """The teachers' metrics on the validation split, as one model."""
    import torch
    from torch import nn

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(ensemble.models)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return ensemble.distribution(base, {"inputs": inputs}, 1.0).clamp_min(1e-12).log()

    metrics: dict[str, float] = base.evaluate(Mean().to("cpu"), "val")
    return metrics


def _share(student: float, teacher: float, direction: str) -> float:
    """How much of the teacher's score the student reaches; above 1 it is better."""
    if direction == "minimize":
        student, teacher = teacher, student
    return student / teacher if teacher else 1.0


def _metrics_of(folder: Path) -> dict[str, float]:
    try:
        return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(map(repr, shown)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
