"""Slow: preprocess of a file that is larger than the memory it may take."""

from pathlib import Path

import pytest

from benchmarks.preprocess import measure, ours, write_rows
from trainer.artifacts import manifest

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

MEGABYTES = 1024
PEAK_MEGABYTES = 800


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "dataset"
    rows = write_rows(source, MEGABYTES << 20)
    _, _, peak = measure(ours(source, out, near=True))
    assert manifest.read(out, "dataset").meta["num_read"] == rows
    assert peak < PEAK_MEGABYTES, f"{peak:.0f} MB of all processes for a file of {MEGABYTES} MiB"
