"""Cores that a container may use."""

from pathlib import Path

import pytest

from trainer import cores
from trainer.data import engine


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("9900000 100000", 8), ("?", 8)],
)
def test_workers_are_as_many_as_the_quota_gives(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert engine.num_workers(0) == expected
    assert engine.num_workers(5) == 5
