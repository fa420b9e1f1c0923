"""Train a model and write its folder: what each rank of the stage `train` does."""

from __future__ import annotations

from contextlib import nullcontext

from torch import distributed

from trainer import log, models, tasks
from trainer.artifacts.card import write_model_card
from trainer.artifacts.dataset import Dataset
from trainer.models.shapes import shapes_only
from trainer.monitor.trackers import open_trackers
from trainer.stage import Call, Result
from trainer.train.fit import fit
from trainer.train.state import history_lines, seed_all

HISTORY = "history.jsonl"


def train(call: Call) -> Result:
    """Train in this process (a rank of the process group, where there is one); rank 0 writes the model folder."""
    params, dataset = call.params, Dataset(call.inputs["dataset"])
    task = tasks.build(params, dataset)
    seed_all(params.train.seed)
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    # Only the first rank's values count: the others need not have room for the whole model.
    with nullcontext() if first else shapes_only():
        model = models.build(params.model, dataset.spec)
    num_parameters = models.num_parameters(model)
    used = {name: getattr(params, name).model_dump(mode="json") for name in ("task", "model", "train")}
    if first:
        log.say(f"train {params.model.name} on {task.num_examples('train')} examples", num_parameters=num_parameters)
    sinks = open_trackers(params, "train", call.scratch) if first else []
    fitted = fit(params, task, model, scratch=call.scratch, sinks=sinks)
    metrics = fitted.metrics
    if first:
        folder = call.outputs["model"]
        tokenizer = dataset.tokenizer_path if dataset.tokenizer_path.is_file() else None
        models.save(folder, fitted.model, params.model, dataset.spec, dataset.labels, tokenizer, metrics)
        (folder / HISTORY).write_text(history_lines(fitted.history), encoding="utf-8")
        title = f"{params.model.name} {params.task.name} model"
        write_model_card(folder, title=title, dataset=dataset, metrics=metrics, params=used, made_by="train")
        rounded = {name: round(value, 4) for name, value in metrics.items()}
        log.say(f"trained {fitted.steps} steps in {fitted.seconds:.1f} s, best at step {fitted.best_step}", **rounded)
    meta = {
        "task": params.task.name,
        "num_parameters": num_parameters,
        "data_version": dataset.meta.get("data_version", ""),
        "val": metrics,
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "skipped": fitted.skipped,
        "rollbacks": fitted.rollbacks,
    }
    return Result(metrics=metrics, meta={"model": meta}, params=used)
