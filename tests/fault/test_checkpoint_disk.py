"""Checkpoints on disks that are full or read-only: real file systems, mounted for the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from trainer.errors import StorageError
from trainer.parallel.group import Ranks
from trainer.train.checkpoint import Checkpoints

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or os.geteuid() != 0,
        reason="mounting a small file system takes root on Linux",
    ),
]


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    yield place
    subprocess.run(["umount", place], check=True)


def tree(step: int, size: int) -> dict:
    return {"w": torch.full((size,), float(step)), "step": step}


def save_too_much(kept: Checkpoints, tree: dict, durable: bool) -> None:
    """Save, and do as the loop does when the thread has failed."""
    kept.save(20, tree, {}, durable=durable)
    end = time.monotonic() + 30
    while not kept.failed:
        assert time.monotonic() < end
        time.sleep(0.01)
    kept.settle()


@pytest.mark.parametrize("durable", [False, True])
def test_a_full_disk_is_named_and_leaves_the_older_checkpoint_and_the_state(durable, disk):
    with Checkpoints(disk / "run", 2, Ranks(), "run") as kept:
        kept.save(10, tree(10, 100_000), {}, durable=True)
        large = tree(20, 2_000_000)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            save_too_much(kept, large, durable)
        assert "free some space" in caught.value.hint
        assert bool((large["w"] == 20.0).all())
        assert [path.name for path in (disk / "run").iterdir()] == ["step-000000010"]
        # There is room again: the next one is saved.
        kept.save(30, tree(30, 100_000), {}, durable=True)
    assert Checkpoints(disk / "run", 2, Ranks(), "run").load()[0]["step"] == 30


def test_from_a_read_only_disk_one_resumes_but_does_not_save(disk):
    with Checkpoints(disk / "run", 2, Ranks(), "run") as kept:
        kept.save(10, tree(10, 1000), {}, durable=True)
        kept.save(20, tree(20, 1000), {}, durable=True)
    (disk / "run" / "step-000000020" / "state.json").write_text("{}")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with Checkpoints(disk / "run", 2, Ranks(), "run") as kept:
        assert kept.load()[0]["step"] == 10
        with pytest.raises(StorageError, match="Read-only file system"):
            kept.save(11, tree(11, 1000), {}, durable=True)
