"""Stage promote: enter the candidate in the registry, and make it the champion if the gate let it pass."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import log, storage
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.errors import ArtifactError, GateRefused
from trainer.registry import Promotion, Registry
from trainer.stage import Call, Result


def run(call: Call) -> Result:
    """Apply the evaluation's decision.

    A refused candidate is entered as a version too, with its figures, but the champion stays. The output holds
    promotion.json: `decision`, `reason`, `version`, `digest`, `champion`, `champion_digest`, `previous`, `registry`,
    `model`.

    Raises:
        ArtifactError: the evaluation is not of this candidate on this dataset.
    """
    promote = call.params.promote
    candidate = manifest.read(call.inputs["quantized"], "model", verify=False)
    evaluation = _evaluation_of(call, candidate)
    gate = evaluation["gate"]
    registry = Registry(promote.registry)
    with tempfile.TemporaryDirectory(prefix="millrace-") as cache:
        test = held_out_folder(Dataset(call.inputs["dataset"]), Path(cache) / "test")
        version = registry.add(
            promote.model,
            call.inputs["quantized"],
            test,
            evaluation,
            bytes=int(evaluation["candidate"]["bytes"]),
            metrics={name: value for name, value in evaluation["candidate"].items() if isinstance(value, (int, float))},
        )
    decision, reason = gate["decision"], gate["reason"]
    before = registry.champion(promote.model)
    event, expected, previous = (before.number, before.version, before.version) if before else (0, "", "")
    if before is None or before.version != version.version:
        expected = gate["champion"]
    elif _carried_out(before, gate):
        previous = before.previous
    else:
        decision, reason = "promoted", f"it is the champion already, {version.version}"
    if decision == "promoted":
        try:
            # For the champion itself this changes nothing but a champion.json that a killed run left behind the log.
            event = registry.promote(promote.model, version.version, expected, reason).number
        except GateRefused as error:
            decision, reason = "refused", f"{error.message}; {error.hint}"
    registry.judge(promote.model, version.version, decision, reason, event, evaluation)
    champion = registry.champion(promote.model)
    outcome = {
        "decision": decision,
        "reason": reason,
        "version": version.version,
        "digest": candidate.digest,
        "champion": champion.version if champion else "",
        "champion_digest": champion.digest if champion else "",
        "previous": previous,
        "registry": promote.registry,
        "model": promote.model,
    }
    storage.write_json(call.outputs["promotion"] / "promotion.json", outcome)
    log.say(
        f"{decision}: {promote.model} {version.version} ({reason}); champion {outcome['champion'] or 'none'}"
        f" in {promote.registry}"
    )
    return Result(
        metrics={"promoted": float(decision == "promoted")},
        meta={"promotion": {"candidate": candidate.digest}},
        volatile=("promotion.json",),
        gate_reason=reason if decision != "promoted" else "",
    )


def _carried_out(newest: Promotion, gate: Mapping[str, Any]) -> bool:
    """Whether the log's newest entry is this very decision: a run that was killed after it ends as it would have."""
    found = newest.action, newest.previous, newest.reason
    return gate["decision"] == "promoted" and found == ("promote", gate["champion"], gate["reason"])


def _evaluation_of(call: Call, candidate: manifest.Manifest) -> dict[str, Any]:
    """The evaluation's metrics.json, provided that it is of this candidate and this dataset."""
    folder = call.inputs["evaluation"]
    meta = manifest.read(folder, "evaluation", verify=False).meta
    dataset = manifest.read(call.inputs["dataset"], "dataset", verify=False)
    for what, found, expected in (
        ("candidate", meta.get("candidate"), candidate.digest),
        ("dataset", meta.get("dataset"), dataset.digest),
    ):
        if found != expected:
            raise ArtifactError(
                f"{folder}: is the evaluation of another {what} ({str(found)[:12]} instead of {expected[:12]})",
                "run stage evaluate again with the same folders",
            )
    return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def held_out_folder(dataset: Dataset, folder: Path) -> Path:
    """A sealed dataset folder that holds only the test split of another: what later challengers are compared on.

    The manifest's meta is the dataset's, with counts of the test split only and `of`, the dataset's digest.
    """
    folder.mkdir(parents=True)
    for name in ("labels.json", "tokenizer.json", "card.md"):
        if (dataset.folder / name).is_file():
            shutil.copyfile(dataset.folder / name, folder / name)
    shutil.copytree(dataset.folder / "test", folder / "test")
    meta = dict(dataset.meta) | {"of": dataset.manifest.digest}
    for count in ("rows", "tokens", "bytes"):
        if isinstance(meta.get(count), dict):
            meta[count] = {"test": meta[count].get("test", 0)}
    manifest.seal(folder, "dataset", meta, {})
    return folder
