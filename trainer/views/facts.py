"""What a stage's page is made of: its artifacts, read without fail. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.artifacts import manifest
from trainer.errors import MillraceError
from trainer.storage import read_json


@dataclass(frozen=True)
class Facts:
    """What the sections of a page are made from.

    Attributes:
        outputs: folders of the stage's outputs.
        metrics: what the stage returned.
        meta: `meta` of the stage's first output.
        record: `record` of it: resolved parameters, seconds, memory.
        temporary: whether the registry ends with the container that the stage runs in.
    """

    outputs: Mapping[str, Path]
    metrics: Mapping[str, float]
    meta: Mapping[str, Any]
    record: Mapping[str, Any]
    temporary: bool = False

    def read(self, port: str, name: str) -> dict[str, Any]:
        """A JSON file of an output; empty if it is not there or no JSON object."""
        return read_json(self.outputs[port] / name) if port in self.outputs else {}

    def setting(self, dotted: str) -> Any:
        """A parameter as the stage used it; None if its record has none of this name."""
        found: Any = self.record.get("params")
        for key in dotted.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def is_off(self, section: str) -> bool:
        """Whether the stage was switched off by `SECTION.enabled`."""
        return self.setting(f"{section}.enabled") is False


@dataclass(frozen=True)
class Told:
    """What a stage's own function has to say.

    Attributes:
        lead: one sentence: what the stage did, with the figures that matter most.
        body: Markdown blocks, in order.
        warnings: sentences that are worth knowing.
        next: sentences: what to look at or to do.
        outcome: one word for the heading.
    """

    lead: str
    body: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    outcome: str = "done"


def open_manifest(folder: Path) -> manifest.Manifest | None:
    """The manifest of a folder, its files unread; None if it has none or is corrupted."""
    try:
        return manifest.read(folder, verify=False)
    except (MillraceError, OSError):
        return None
