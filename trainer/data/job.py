"""What all kernels of one run share, kept in a file of the work folder that every worker reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.config.data import Data


@dataclass(frozen=True)
class Job:
    """The plan of a run. The second half is known only once all rows are read.

    Attributes:
        data: section `data`.
        task: as task.name.
        partitions: number of ranges of the content hash that are worked on one at a time; a power of two.
        num_chunks: chunks of raw data.
        names: names of the raw files.
        labels: the labels that stay, in order.
        limits: rows to take of each partition.
        cuts: as `split.assign` takes them.
    """

    data: dict[str, Any]
    task: str
    partitions: int
    num_chunks: int
    names: list[str]
    labels: list[str] | None = None
    limits: list[int] | None = None
    cuts: list[tuple[int, int]] | None = None

    @property
    def config(self) -> Data:
        """The section as a model."""
        return _config(json.dumps(self.data, sort_keys=True))

    def save(self, work: Path) -> Job:
        """Write the plan into the work folder, over an older one."""
        (work / "job.json").write_text(json.dumps(asdict(self)))
        return self

    def extended(self, **fields: Any) -> Job:
        """A copy with more fields known."""
        return replace(self, **fields)


@lru_cache(maxsize=8)
def _config(text: str) -> Data:
    return Data.model_validate_json(text)


def load(work: str | Path) -> Job:
    """Read the plan."""
    return Job(**json.loads((Path(work) / "job.json").read_text()))
