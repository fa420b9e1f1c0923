"""dvc.lock against what the stages ran with.

A stage reads params.yaml when it begins and DVC when it ends: if somebody edits the file in between, dvc.lock says that
the result was made with the new values, and the stage would never run with them. The stage's own record knows better.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from pipelines import dvcfile, project
from trainer import storage
from trainer.config import Params
from trainer.config.load import apply_overrides, validate, with_values
from trainer.errors import ConfigError
from trainer.record import without_secrets
from trainer.stage import STAGES


def drop_untrue(folder: Path, params: Params, stages: Iterable[str]) -> list[str]:
    """Take stages that ran with other parameters than dvc.lock says out of it, so that they run again.

    Args:
        folder: the project's folder.
        params: the configuration at the start of the run.
        stages: names of stages that ran.

    Returns:
        The names of those that were taken out.
    """
    from ruamel.yaml import YAML

    path = folder / "dvc.lock"
    if not path.is_file():
        return []
    yaml = YAML()
    yaml.default_flow_style = False
    lock = yaml.load(path.read_text(encoding="utf-8"))
    entries = lock.get("stages") or {}
    untrue = [
        name for name in stages if name in entries and name in STAGES and not _true(folder, params, name, entries)
    ]
    if untrue:
        runs = Path(project.dvc(folder, "cache", "dir").strip()) / "runs"
        for name in untrue:
            _forget(runs, entries.pop(name))
        text = StringIO()
        yaml.dump(lock, text)
        storage.write_atomic(path, text.getvalue().encode())
    return untrue


def _true(folder: Path, params: Params, name: str, entries: Mapping[str, Any]) -> bool:
    """Whether a stage's record holds the parameters of its entry in dvc.lock."""
    stage, entry = STAGES[name], entries[name]
    found = storage.read_json(folder / dvcfile.out(next(iter(stage.outputs))) / storage.MANIFEST).get("record") or {}
    if not found:
        return True  # a stage that failed; DVC has removed its output
    sections = (entry.get("params") or {}).get(project.PARAMS) or {}
    words = [word for word in shlex.split(entry["cmd"]) if word.startswith("data.source=")]
    try:
        # Sections that are not the stage's own only have to fit: those of the start do.
        own = {section: sections.get(section) or {} for section in stage.sections}
        expected = validate(apply_overrides(params.model_dump(mode="json") | own, words))
        if name == "train":
            best = storage.read_json(folder / dvcfile.out("tuning") / "best.json").get("params") or {}
            expected = with_values(expected, best)
    except ConfigError:
        return False
    tree = without_secrets(expected.model_dump(mode="json"))
    return all(tree[section] == (found.get("params") or {}).get(section) for section in stage.sections)


def _forget(runs: Path, entry: Any) -> None:
    """Remove the run from DVC's cache of runs, which would bring it back under the wrong parameters."""
    from ruamel.yaml import YAML

    for path in runs.glob("*/*/*"):
        with storage.explained(path):
            if YAML(typ="safe").load(path.read_text(encoding="utf-8")) == entry:
                path.unlink()
                with suppress(OSError):
                    path.parent.rmdir()  # DVC takes it for granted that something is in such a folder
