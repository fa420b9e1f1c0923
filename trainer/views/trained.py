"""What train, distill and quantize have to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.views import markdown as md
from trainer.views.facts import Facts, Told

_NAMES = {
    "val_accuracy": "accuracy",
    "val_macro_f1": "macro-F1",
    "val_loss": "loss (nats)",
    "val_bits_per_byte": "bits per byte",
    "val_perplexity": "perplexity",
}
_SETTINGS = (
    "model.name", "train.epochs", "train.max_steps", "train.batch_size", "train.accumulation", "train.optimizer",
    "train.lr", "train.schedule", "train.precision", "train.processes", "train.seed",
)  # fmt: skip
_STUDENT = (
    "distill.student.name", "distill.temperature", "distill.alpha", "distill.epochs", "distill.lr", "distill.teachers",
)  # fmt: skip


def train(facts: Facts) -> Told:
    """Scores on the validation split, the course of training and its settings."""
    meta = facts.meta
    lead = (
        f"Trained model {md.code(facts.setting('model.name'))} of **{md.number(meta['num_parameters'])}** parameters in"
        f" {md.number(meta['steps'])} steps; the best weights are those of step {md.number(meta['best_step'])}:"
        f" {headline(meta['val'])}."
    )
    body = [
        md.section("Figures on the validation split", _scores({"model": meta["val"]})),
        md.section("Settings", _settings(facts, _SETTINGS)),
    ]
    return Told(lead, body, _course(meta), ["The report of stage evaluate shows the learning curves and the test."])


def distill(facts: Facts) -> Told:
    """The student beside its teacher."""
    found = facts.read("student", "distillation.json")
    if facts.is_off("distill") or not found:
        return Told(
            "**No distillation** (`distill.enabled` is false): the trained model itself is passed on.",
            [md.section("Figures on the validation split", _scores({"model": facts.meta.get("val") or {}}))],
        )
    metric, sizes = str(found["metric"]), found["num_parameters"]
    teachers = len(found.get("teachers", []))
    lead = (
        f"Taught a student of **{md.number(sizes['student'])}** parameters, {md.share(sizes['ratio'])} of its teacher's"
        f" {md.number(sizes['teacher'])}; it reaches **{md.share(found['share_of_teacher'])}** of the teacher's"
        f" {_NAMES.get(metric) or md.code(metric)}."
    )
    rows = {"student": found["student"], "teacher" if teachers < 2 else f"{teachers} teachers": found["teacher"]}
    warnings = _course(facts.meta)
    if found["share_of_teacher"] < 0.95:
        warnings.append("The student stays more than 5 % behind: give it more epochs or width (`distill`).")
    if sizes["ratio"] >= 1:
        warnings.append("The student is no smaller than its teacher: nothing is saved by it.")
    return Told(
        lead,
        [
            md.section("Figures on the validation split", _scores(rows)),
            md.section("Settings", _settings(facts, _STUDENT)),
        ],
        warnings,
        ["Stage quantize takes the student; stage evaluate compares it with its teacher on the test split."],
    )


def quantize(facts: Facts) -> Told:
    """All variants of the model, and which of them is served."""
    meta, table = facts.meta, facts.read("quantized", "table.json")
    rows = [row for row in table.get("rows", []) if isinstance(row, dict)]
    served = next((row for row in rows if row.get("served")), {})
    off = facts.is_off("quantize")
    saved = f"**{md.size(meta['bytes'])}**, {md.share(meta['bytes'] / meta['fp32_bytes'])} of the fp32 weights"
    lead = f"Serves {md.code(meta['served'])}: {saved}; {headline(meta['val'])} on the validation split."
    if off:
        lead = f"**Not quantised** (`quantize.enabled` is false): the model is only exported. {lead}"
    pruned = facts.setting("quantize.prune.target")
    if pruned:
        lead += f" {md.share(pruned)} of the weights were pruned to zero before."
    metric = str(table.get("metric", "val_accuracy"))
    unit = "lost, points" if metric in ("val_accuracy", "val_macro_f1") else "lost, %"
    head = (
        "variant", "bytes", "of fp32", "latency p50, ms", "p99, ms", "rows per s", _NAMES.get(metric) or md.code(metric), unit,
    )  # fmt: skip
    cells = [
        (
            md.code(row["variant"]) + (" **served**" if row.get("served") else ""),
            md.number(row["bytes"]),
            md.share(row["ratio"]),
            md.number(row["latency_p50_ms"], 3),
            md.number(row["latency_p99_ms"], 3),
            md.number(round(row["rows_per_s"])),
            md.score(row["score"]),
            f"{row['lost']:+.2f}",
        )
        for row in rows
    ]
    note = (
        f"Timed on {table.get('threads', 1)} CPU thread; rows per s in batches of {table.get('throughput_batch', 64)}."
    )
    body = [md.section("Variants", md.table(head, cells), note) if cells else ""]
    return Told(
        lead,
        body,
        _about_variants(rows, served, table),
        ["Stage evaluate tests `model.onnx` of the artifact `quantized` on the test split: it is the candidate."],
    )


def _about_variants(
    rows: Sequence[Mapping[str, Any]], served: Mapping[str, Any], table: Mapping[str, Any]
) -> list[str]:
    found = [f"{md.code(row['variant'])}: {md.prose(row['note'])}." for row in rows if row.get("note")]
    plain = next((row for row in rows if row.get("variant") == "fp32 onnx"), {})
    if served and plain and served is not plain:
        slower = served["latency_p50_ms"] / max(plain["latency_p50_ms"], 1e-9)
        if slower > 1.25:
            found.append(
                f"The served variant takes {slower:.1f} times as long as fp32 ONNX here: if speed matters more than"
                " size, compare them on the machine that serves."
            )
        if served["ratio"] > 0.5:
            found.append("It is more than half as large as fp32: most of its weights are of a kind that stays fp32.")
    return found


def headline(scores: Mapping[str, Any]) -> str:
    """The first known score in words."""
    name = next((name for name in _NAMES if name != "val_loss" and name in scores), "")
    return f"{_NAMES[name]} **{md.score(scores[name])}**" if name else "no score"


def _scores(rows: Mapping[str, Mapping[str, Any]]) -> str:
    names = [name for name in _NAMES if any(name in scores for scores in rows.values())]
    head = ("", *(_NAMES[name] for name in names))
    return md.table(head, [(who, *(md.score(scores.get(name)) for name in names)) for who, scores in rows.items()])


def _settings(facts: Facts, names: Sequence[str]) -> str:
    """Parameters as they were used; those that are 0 or empty, which stands for a default elsewhere, are left out."""
    found = [(name, facts.setting(name)) for name in names]
    rows = [(md.code(name), md.code(value, 60)) for name, value in found if value or name.endswith(("seed", "alpha"))]
    return md.table(("parameter", "value"), rows, left=2) if rows else ""


def _course(meta: Mapping[str, Any]) -> list[str]:
    steps, best = meta.get("steps"), meta.get("best_step")
    if not isinstance(steps, int) or not isinstance(best, int) or steps < 2:
        return []
    if best == steps:
        return ["The last evaluation was the best: more epochs may still help."]
    if best < steps / 2:
        return [f"It was best at step {best:,} of {steps:,} and got no better since: fewer epochs would do as well."]
    return []
