"""Stage `quantize`: prune (optionally), calibrate, export, quantise to int8, and measure each variant right after.

model.onnx          the served model: int8 as `quantize.serve` says, or fp32 where `quantize.enabled` is false
model.safetensors   the same model in fp32, pruned if it was asked for, its probabilities calibrated
table.json          one row per variant: bytes, latency, throughput, score on the validation split
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import storage
from trainer.artifacts.card import write_model_card
from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.config.load import with_values
from trainer.errors import MillraceError
from trainer.log import say
from trainer.stage import Call, Result

if TYPE_CHECKING:
    from trainer.compress.measure import Row
    from trainer.models import Loaded
    from trainer.tasks.base import Task

TABLE, SERVED = "table.json", "model.onnx"


def run(call: Call) -> Result:
    """Write the quantized folder.

    Raises:
        MillraceError: the variant that is to be served could not be made.
    """
    from trainer import models, tasks
    from trainer.compress import measure
    from trainer.compress.calibrate import calibrate
    from trainer.train.state import history_lines

    params, out = call.params, call.outputs["quantized"]
    dataset = Dataset(call.inputs["dataset"])
    loaded = models.load(call.inputs["student"])
    task = tasks.build(params, dataset)
    history: list[dict[str, Any]] = []
    if params.quantize.prune.target > 0:
        history = prune(params, task, loaded, call.scratch)
    temperature = calibrate(task, loaded.model) if params.quantize.temperature else 1.0
    if temperature != 1.0:
        say("quantize: logits are divided", temperature=temperature)
    tokenizer = call.inputs["student"] / models.TOKENIZER
    models.save(out, loaded.model, loaded.config, loaded.spec, loaded.labels, tokenizer, {})
    rows, served = variants(params, task, loaded, (out / models.WEIGHTS).stat().st_size)
    (out / SERVED).write_bytes(served)
    score = next(each.score for each in rows if each.served)
    metrics = {f"val_{task.metric}": score}
    storage.write_json(out / models.METRICS, metrics)
    storage.write_json(out / TABLE, measure.as_json(rows, task.metric))
    if history:
        (out / "history.jsonl").write_text(history_lines(history), encoding="utf-8")
    for line in measure.as_text(rows, f"val_{task.metric}").splitlines():
        say(line)
    card(params, dataset, loaded, rows, metrics, out)
    chosen = next(each for each in rows if each.served)
    fp32 = rows[0]
    meta = {
        "task": params.task.name,
        "num_parameters": models.num_parameters(loaded.model),
        "data_version": dataset.meta.get("data_version", ""),
        "served": chosen.variant,
        "temperature": temperature,
        "bytes": chosen.bytes,
        "fp32_bytes": fp32.bytes,
        "val": metrics,
        "fp32_val": {f"val_{task.metric}": fp32.score},
    }
    figures = {**metrics, "bytes": float(chosen.bytes), "bytes_ratio": chosen.ratio, "points_lost": chosen.lost}
    return Result(figures, {"quantized": meta}, (TABLE,))


def prune(params: Params, task: Task, loaded: Loaded, scratch: Path) -> list[dict[str, Any]]:
    """Prune the model in place while fine-tuning it; returns the history."""
    from trainer.compress.prune import Pruner, sparsity
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    config = params.quantize.prune
    changed = with_values(
        params,
        {
            "train.epochs": config.epochs,
            "train.max_steps": 0,
            "train.min_steps": 0,
            "train.lr": config.lr or params.train.lr / 10,
            "train.early_stopping.patience": 0,
            # Evaluated once, at the end: the best weights of an earlier evaluation would not be pruned enough.
            "train.eval_every": 10**9,
            "train.compile": False,
            "tune.space": {},
        },
    )
    seed_all(params.train.seed)
    pruner = Pruner(config, loaded.model)
    fitted = fit(changed, task, loaded.model, scratch=scratch, on_step=pruner.on_step, what="prune")
    pruner.close()
    say(f"pruned {config.scope}", sparsity=sparsity(fitted.model), target=config.target, **fitted.metrics)
    return fitted.history


def variants(params: Params, task: Task, loaded: Loaded, fp32_bytes: int) -> tuple[list[Row], bytes]:
    """Make and measure all variants; returns the rows and the content of the served file."""
    from trainer.compress import measure, quantize
    from trainer.compress.export import export_onnx, serialise

    config, metric = params.quantize, task.metric
    fp32 = measure.row("fp32 torch", fp32_bytes, measure.measure(task, loaded.model), None, metric)
    rows = [fp32]
    exported = export_onnx(loaded.model, loaded.spec)
    files = {"fp32 onnx": serialise(exported)}
    failures: dict[str, str] = {}
    if config.enabled:
        batches = list(calibration(task, config.calibration_rows))
        makers: dict[str, Callable[[], Any]] = {
            "int8 onnx-dynamic": lambda: quantize.quantize_dynamic(exported),
            "int8 onnx-static": lambda: quantize.quantize_static(exported, batches),
        }
        for name, make in makers.items():
            try:
                files[name] = serialise(make())
            except Exception as error:  # a quantiser that does not take this model leaves the others
                failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
    wanted = f"int8 {config.serve}" if config.enabled else "fp32 onnx"
    for name, content in files.items():
        try:
            figures = measure.measure(task, measure.OnnxModule(content))
        except Exception as error:  # onnxruntime's own classes: a kernel is missing on this processor
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            continue
        rows.append(measure.row(name, len(content), figures, fp32, metric, served=name == wanted))
    if config.enabled and config.torchao:
        try:
            model, note = quantize.quantize_torchao(loaded.model)
            figures = measure.measure(task, model)
            rows.append(measure.row("int8 torchao", quantize.tensor_bytes(model), figures, fp32, metric, note))
        except Exception as error:  # not installed, or a kernel that torchao lacks
            failures["int8 torchao"] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    for name, reason in failures.items():
        say(f"quantize: {name} left out: {reason}")
    if wanted in failures:
        raise MillraceError(
            f"quantize: {wanted} could not be made: {failures[wanted]}", "choose another quantize.serve"
        )
    return rows, files[wanted]


def calibration(task: Task, rows: int) -> Iterator[np.ndarray]:
    """Inputs of up to `rows` examples of the train split, spread over it."""
    count = task.num_examples("train")
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:rows])
    for start in range(0, len(chosen), 16):
        yield task.batch("train", chosen[start : start + 16])["inputs"].numpy()


def card(
    params: Params, dataset: Dataset, loaded: Loaded, rows: list[Row], metrics: dict[str, float], out: Path
) -> None:
    """README.md of the folder. Times are left out: the card is the same for the same weights."""
    chosen = next(each for each in rows if each.served)
    fp32 = rows[0]
    lines = ["| Variant | Bytes | Of fp32 | Score | Lost |", "|---|---|---|---|---|"]
    lines += [
        f"| {each.variant}{' (served)' if each.served else ''} | {each.bytes:,} | {each.ratio:.3f} "
        f"| {each.score:.4f} | {each.lost:+.2f} |"
        for each in rows
    ]
    pruned = params.quantize.prune
    how = f" after pruning to {pruned.target:.0%} zeros" if pruned.target else ""
    note = (
        f"`{SERVED}` is `{chosen.variant}`{how}: {chosen.bytes:,} bytes, {chosen.ratio:.1%} of fp32's {fp32.bytes:,}. "
        "`model.safetensors` holds the same model in fp32.\n\n" + "\n".join(lines)
    )
    sections = {name: getattr(params, name).model_dump(mode="json") for name in ("task", "quantize")}
    title = f"{loaded.config.name} {params.task.name} model, {chosen.variant}"
    write_model_card(
        out,
        title=title,
        dataset=dataset,
        metrics=metrics,
        params=sections,
        made_by="quantize",
        base="the student",
        notes=note,
    )
