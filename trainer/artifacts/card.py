"""Model cards: README.md of a model folder in the shape that Hugging Face reads, generated from what was measured.

The YAML front matter carries a `model-index` (https://github.com/huggingface/hub-docs, modelcard.md); the text follows
Mitchell et al. 2019, "Model Cards for Model Reporting". The same inputs give the same bytes: no times, no host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer import __version__
from trainer.artifacts.dataset import SPLITS, Dataset

_PIPELINES = {"classify": "text-classification", "lm": "text-generation", "image": "image-classification"}
_INTENDED = {
    "classify": "Assigning one of {labels} labels to a text like those of its training data.",
    "lm": "Continuing texts like those of its training data, and scoring how likely such texts are.",
    "image": "Assigning one of {labels} labels to a picture like those of its training data.",
}
_LIMITS = {
    "classify": "Every text gets one of the known labels, also a text that fits none of them: look at the score. "
    "A text longer than {length} tokens is cut off there.",
    "lm": "It continues texts by their form; nothing that it writes is checked for truth. "
    "It sees at most {length} tokens at once.",
    "image": "Every picture gets one of the known labels, also a picture that fits none of them: look at the score. "
    "Pictures are scaled to {size} x {size} pixels.",
}
_SPLIT_NAMES = {"val": "validation", "test": "test", "train": "train"}


def write_model_card(
    folder: Path,
    *,
    title: str,
    dataset: Dataset,
    metrics: Mapping[str, float],
    params: Mapping[str, Any],
    made_by: str,
    base: str = "",
    notes: str = "",
) -> None:
    """Write README.md into a model folder.

    Args:
        folder: the model folder.
        title: name of the model, the heading of the card.
        dataset: what it was trained on; version, counts and labels are taken from its manifest.
        metrics: name -> value; `val_accuracy` is the accuracy of the validation split, `test_…` or a bare name the
            test split's. Values that are not finite are left out.
        params: parameters as nested plain values: the sections that made this model.
        made_by: the stage that made it.
        base: what it was made from (for a student: its teacher); empty for a model trained from scratch.
        notes: a paragraph to add, plain Markdown.
    """
    results = [(*_split_of(name), float(value)) for name, value in metrics.items() if math.isfinite(value)]
    front = _front_matter(title, dataset, results)
    body = [
        f"# {_inline(title)}",
        _summary(dataset, made_by, base),
        *([notes.strip()] if notes.strip() else []),
        "## Intended use",
        _fill(_INTENDED, dataset) + " Ask it with `millrace predict` or load `model.safetensors` "
        "(or `model.onnx`, where there is one); loading executes no code.",
        "## Training data",
        _training_data(dataset),
        "## Evaluation",
        _evaluation(results),
        "## Parameters",
        _fenced(yaml.safe_dump(_plain(dict(params)), sort_keys=True, allow_unicode=True), "yaml"),
        "## Limitations",
        _fill(_LIMITS, dataset)
        + " Its figures hold for data drawn like the splits above; on other data, measure first.",
    ]
    text = f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _split_of(name: str) -> tuple[str, str]:
    """`val_macro_f1` -> ("val", "macro_f1"); a bare name is of the test split."""
    head, _, rest = name.partition("_")
    return (head, rest) if head in SPLITS and rest else ("test", name)


def _front_matter(title: str, dataset: Dataset, results: list[tuple[str, str, float]]) -> str:
    pipeline = _PIPELINES.get(dataset.spec.task, dataset.spec.task)
    entries = []
    for split in dict.fromkeys(split for split, _, _ in results):
        entries.append(
            {
                "task": {"type": pipeline},
                "dataset": {
                    "name": _source(dataset),
                    "type": _source(dataset),
                    "split": _SPLIT_NAMES[split],
                    "revision": _version(dataset),
                },
                "metrics": [{"type": name, "value": value} for of, name, value in results if of == split],
            }
        )
    front: dict[str, Any] = {
        "library_name": "millrace",
        "pipeline_tag": pipeline,
        "tags": ["millrace", dataset.spec.task],
        "metrics": sorted({name for _, name, _ in results}),
        "model-index": [{"name": title, "results": entries}],
    }
    return str(yaml.safe_dump(front, sort_keys=False, allow_unicode=True))


def _summary(dataset: Dataset, made_by: str, base: str) -> str:
    origin = f" from {_inline(base)}" if base else ""
    return f"Made by stage `{made_by}` of millrace {__version__}{origin} for task `{dataset.spec.task}`."


def _training_data(dataset: Dataset) -> str:
    meta = dataset.meta
    rows = [
        ("Source", f"`{_source(dataset)}`"),
        ("Data version", f"`{_version(dataset)}`"),
        ("Dataset digest", f"`{dataset.manifest.digest}`"),
    ]
    rows += [(f"Rows, {_SPLIT_NAMES[split]}", f"{count:,}") for split, count in meta.get("rows", {}).items()]
    rows += [(f"Rows dropped, {_inline(reason)}", f"{count:,}") for reason, count in meta.get("dropped", {}).items()]
    if dataset.labels:
        rows.append(("Labels", f"{len(dataset.labels)}: {', '.join(f'`{code(name)}`' for name in dataset.labels)}"))
    return _table(("", ""), rows)


def _evaluation(results: list[tuple[str, str, float]]) -> str:
    if not results:
        return "Not evaluated yet."
    rows = [(_SPLIT_NAMES[split], name, f"{value:.6g}") for split, name, value in results]
    return _table(("Split", "Metric", "Value"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell(each) for each in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text as a cell of a table: on one line, without the character that ends it."""
    return " ".join(text.split()).replace("|", "\\|")


def _inline(text: str) -> str:
    """Text on one line that cannot start a code span or HTML."""
    return code(text).replace("<", "&lt;")


def code(text: str) -> str:
    """Text on one line that cannot end the code span it is put in, where everything else is literal."""
    return " ".join(text.split()).replace("`", "'")


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}{fence}"


def _fill(texts: Mapping[str, str], dataset: Dataset) -> str:
    spec = dataset.spec
    template = texts.get(spec.task, f"Task {spec.task}.")
    return template.format(labels=spec.num_labels, length=spec.max_length, size=spec.image_size)


def _source(dataset: Dataset) -> str:
    return code(str(dataset.meta.get("source", ""))) or "unknown"


def _version(dataset: Dataset) -> str:
    return code(str(dataset.meta.get("data_version", ""))) or "unknown"


def _plain(value: Any) -> Any:
    """Tuples as lists and everything else that YAML has no tag-free form for as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
