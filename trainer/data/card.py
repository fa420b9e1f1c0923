"""card.md: what a dataset folder holds and where it came from, for people."""

from __future__ import annotations

from typing import Any

from trainer.artifacts.card import cell, code


def render(meta: dict[str, Any]) -> str:
    """The text of card.md from the meta of the manifest."""
    lines = [
        f"# Dataset from `{code(meta['source'])}`",
        "",
        f"Made by `millrace` for the task `{meta['task']}`; data version (DVC md5) `{meta['data_version']}`.",
        "",
        f"{meta['num_read']:,} rows were read, {meta['kept']:,} kept.",
        "",
        "| split | rows | tokens | bytes of text |",
        "|---|---:|---:|---:|",
    ]
    for split, rows in meta["rows"].items():
        lines.append(f"| {split} | {rows:,} | {meta['tokens'][split]:,} | {meta['bytes'][split]:,} |")
    if meta["dropped"]:
        lines += ["", "| dropped because | rows |", "|---|---:|"]
        lines += [f"| {reason.replace('_', ' ')} | {number:,} |" for reason, number in meta["dropped"].items()]
    if meta["label_counts"]:
        lines += ["", "| label | rows |", "|---|---:|"]
        lines += [f"| `{cell(code(label))}` | {number:,} |" for label, number in meta["label_counts"].items()]
    lines += [
        "",
        "Rows are assigned to splits by a hash of their content; duplicates were removed before, so none crosses splits.",
        "",
    ]
    return "\n".join(lines)
