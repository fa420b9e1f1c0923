"""report.html: the whole run on one page. Self-contained, under 1 MB, light and dark, for phones and wide screens.

Every figure comes from the artifacts and their records; nothing is loaded from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

from trainer import __version__
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.evaluate import sections
from trainer.evaluate.charts import esc
from trainer.evaluate.sections import section, table
from trainer.evaluate.subjects import Judged
from trainer.record import git_commit, host, versions
from trainer.stage import Call

_HERE = Path(__file__).parent


def build(call: Call, dataset: Dataset, judged: Judged, metrics: Mapping[str, Any]) -> str:
    """The page.

    Args:
        call: the stage's call; its inputs' records are shown.
        dataset: the dataset.
        judged: what was found out.
        metrics: the content of metrics.json.
    """
    from trainer.tune import plots

    evaluate = call.params.evaluate
    parts = (
        sections.models(judged),
        sections.comparisons(judged, metrics.get("champion")),
        gate(metrics),
        sections.learning(call.inputs, judged.metric),
        sections.compression(call.inputs["quantized"]),
        sections.confusion(judged, dataset),
        sections.mistakes(judged, dataset),
        sections.per_class(judged, dataset),
        sections.calibration(judged),
        sections.examples(judged, dataset, evaluate.examples, evaluate.seed),
        sections.code(judged, evaluate.examples),
        sections.data(dataset),
        sections.search(call.inputs),
        provenance(call),
    )
    gate_ = metrics["gate"]
    return Template((_HERE / "report.html").read_text(encoding="utf-8")).substitute(
        title=esc(f"{call.params.promote.model}: {gate_['decision']}"),
        decision=esc(gate_["decision"]),
        style=(_HERE / "report.css").read_text(encoding="utf-8") + plots.STYLE,
        header=header(call, judged, metrics),
        sections="\n".join(part for part in parts if part),
        footer=f"<p>Made by millrace {esc(__version__)}, stage evaluate. Every figure comes from the run's own artifacts.</p>",
    )


def header(call: Call, judged: Judged, metrics: Mapping[str, Any]) -> str:
    """The verdict, its reason, and the headline figures."""
    gate_ = metrics["gate"]
    candidate = metrics["candidate"]
    tiles: list[tuple[str, str]] = []
    baseline = judged.figures.get("baseline")
    if judged.metric == "accuracy":
        tiles.append((f"{candidate['accuracy']:.1%}", "accuracy on the test split"))
        tiles.append((f"{candidate['macro_f1']:.3f}", "macro-F1"))
        if baseline:
            tiles.append((f"{baseline['accuracy']:.1%}", f"baseline: {baseline['name']}"))
    else:
        tiles.append((f"{candidate['bits_per_byte']:.3f}", "bits per byte on the test split"))
        if baseline:
            tiles.append((f"{baseline['bits_per_byte']:.3f}", f"baseline: {baseline['name']}"))
        if "xz" in metrics:
            tiles.append((f"{metrics['xz']['bits_per_byte']:.3f}", metrics["xz"]["name"]))
    if metrics["comparison"]:
        p_value = metrics["comparison"]["p_value"]
        test = metrics["comparison"]["test"]
        tiles.append(("< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}", f"p against the baseline, {test}"))
    tiles.append((str(sections.size(candidate["bytes"])), "served model"))
    tiles.append((f"{candidate['latency_p50_ms']:.2f} ms", "median latency, one input, one thread"))
    if "cross_validation" in metrics:
        folds = metrics["cross_validation"]
        tiles.append((f"{folds['accuracy']:.1%} ± {100 * folds['std']:.1f}", f"accuracy over {folds['folds']} folds"))
    items = "".join(f"<li><b>{esc(value)}</b><span>{esc(name)}</span></li>" for value, name in tiles)
    verdict = {"promoted": "✓ Promoted", "refused": "✗ Refused"}.get(gate_["decision"], gate_["decision"])
    reason = gate_["reason"][:1].upper() + gate_["reason"][1:]
    task = {"classify": "text classifier", "lm": "language model", "image": "image classifier"}.get(
        call.params.task.name, call.params.task.name
    )
    return (
        f'<span class="verdict">{esc(verdict)}</span>'
        f"<h1>{esc(call.params.promote.model)} <span class=muted>· {esc(task)}</span></h1>"
        f"<p>{esc(reason)}.</p><ul class=tiles>{items}</ul>"
    )


def gate(metrics: Mapping[str, Any]) -> str:
    """The decision and all that went into it."""
    gate_ = metrics["gate"]
    champion = metrics.get("champion")
    facts = [
        ("decision", gate_["decision"]),
        ("reason", gate_["reason"]),
        ("significance level", f"{gate_['alpha']:g}"),
    ]
    facts.append(("champion before", gate_["champion"] or "none"))
    if champion and "p_value" in champion:
        for who in ("candidate", "champion"):
            shown = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in champion[who].items())
            facts.append((f"{who} on the champion's test set", shown))
        facts.append(
            ("rows of it compared", f"{champion['rows']:,} ({champion['left_out']:,} left out as seen in training)")
        )
    items = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in facts)
    return section("Gate", f'<dl class="facts">{items}</dl>')


def provenance(call: Call) -> str:
    """Digests, versions, times and parameters."""
    rows = []
    for name, folder in call.inputs.items():
        found = manifest.read(folder, verify=False)
        record = found.record
        seconds = record.get("seconds")
        memory = record.get("peak_memory_bytes")
        rows.append(
            (
                name, sections.Markup(f"<code>{esc(found.digest[:16])}</code>"),
                sections.Number(f"{seconds:,.1f}" if isinstance(seconds, (int, float)) else ""),
                sections.size(memory) if isinstance(memory, (int, float)) else sections.Number(""),
                str(record.get("started", "")),
            )
        )  # fmt: skip
    made = table(("artifact", "digest", "seconds", "memory", "made"), rows)
    machine = host()
    facts = [(name, value) for name, value in versions().items()]
    facts.append(("commit", git_commit() or "not in a repository"))
    facts.append(
        ("machine", f"{machine.get('processor') or machine['machine']}, {machine['cores']} cores, {machine['system']}")
    )
    items = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in facts)
    parameters = yaml.safe_dump(call.params.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    body = f'<div>{made}</div><div><dl class="facts">{items}</dl></div>'
    return section(
        "Where it comes from",
        f'<div class="columns">{body}</div>'
        f'<details><summary>All parameters</summary><pre class="wrap">{esc(parameters)}</pre></details>',
    )
