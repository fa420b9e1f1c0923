"""The page of a stage: what it did, from what, with which figures, what is worth knowing and what to look at next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.artifacts.manifest import Manifest
from trainer.stage import STAGES
from trainer.views import judged, prepared, trained
from trainer.views import markdown as md
from trainer.views.facts import Facts, Told, open_manifest

# Characters of a digest that are shown: enough to tell artifacts apart, and what messages show.
DIGEST = 12
_TELL: dict[str, Callable[[Facts], Told]] = {
    "preprocess": prepared.preprocess,
    "tune": prepared.tune,
    "train": trained.train,
    "distill": trained.distill,
    "quantize": trained.quantize,
    "evaluate": judged.evaluate,
    "promote": judged.promote,
}
_PAGES = {"evaluate": {"report": ("evaluation", "report.html")}, "tune": {"search": ("tuning", "search.html")}}


def summary(
    stage: str,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    metrics: Mapping[str, float],
    *,
    error: str = "",
    temporary: bool = False,
) -> str:
    """One page of Markdown about a run of a stage; no row of the data is on it.

    Args:
        stage: a name of `trainer.stage.STAGES`.
        inputs: local folder of each input that was given.
        outputs: local folder of each output; one that is not there is left out.
        metrics: what the stage returned.
        error: why the stage failed; empty if it did not.
        temporary: whether the registry ends with the container that the stage runs in.
    """
    made = {port: open_manifest(folder) for port, folder in outputs.items()}
    first = next((found for found in made.values() if found), None)
    record = first.record if first else {}
    facts = Facts(outputs, metrics, first.meta if first else {}, record, temporary)
    told = _failed(stage, error) if error else _tell(stage, facts)
    parts = [
        f"# {stage}: {told.outcome}",
        told.lead,
        *told.body,
        md.section("Worth knowing", md.bullets(told.warnings)),
        md.section("Next", md.bullets(told.next)),
        md.section(
            "Artifacts", _artifacts({port: open_manifest(inputs[port]) for port in inputs}, made), _took(record)
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pages(stage: str, outputs: Mapping[str, Path]) -> dict[str, Path]:
    """Port -> HTML page that the stage wrote, each one file that needs no network; only those that are there."""
    found = {name: outputs[port] / file for name, (port, file) in _PAGES.get(stage, {}).items() if port in outputs}
    return {name: path for name, path in found.items() if path.is_file()}


def _tell(stage: str, facts: Facts) -> Told:
    if not facts.record:
        return Told(f"This stage is to {STAGES[stage].help}. Its output cannot be read here, so no figures are shown.")
    try:
        return _TELL[stage](facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        broken = f"Some of its files are not as this version writes them ({md.code(type(error).__name__)})."
        return Told(f"This stage is to {STAGES[stage].help}.", warnings=[broken])


def _failed(stage: str, error: str) -> Told:
    return Told(
        f"This stage is to {STAGES[stage].help}. It failed:",
        [md.block(error)],
        next=[
            "The log of this step has the lines before it; what follows `fix:` says what to change.",
            "Steps that were done are cached: a new run with the fix goes on from here.",
        ],
        outcome="failed",
    )


def _artifacts(inputs: Mapping[str, Manifest | None], outputs: Mapping[str, Manifest | None]) -> str:
    rows = []
    for direction, manifests in (("in", inputs), ("out", outputs)):
        for port, found in manifests.items():
            if found is None:
                rows.append((direction, md.code(port), "not readable here", "", "", ""))
                continue
            version = str(found.meta.get("data_version") or found.record.get("data_version") or "")
            made = str(found.record.get("started") or "")
            rows.append(
                (
                    direction,
                    md.code(port),
                    md.code(found.digest[:DIGEST]),
                    md.code(version[:DIGEST]) if version else "",
                    md.code(made) if made else "",
                    md.size(sum(file.bytes for file in found.files)),
                )
            )
    return md.table(("", "artifact", "digest", "data version", "begun (UTC)", "size"), rows, left=5) if rows else ""


def _took(record: Mapping[str, object]) -> str:
    parts = [f"took {md.seconds(record['seconds'])}"] if "seconds" in record else []
    if record.get("peak_memory_bytes"):
        parts.append(f"at most {md.size(record['peak_memory_bytes'])} of memory")
    versions = record.get("versions")
    if isinstance(versions, Mapping) and versions.get("millrace"):
        parts.append(f"millrace {md.prose(versions['millrace'])}")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
