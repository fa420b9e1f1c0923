"""Checkpoints of several ranks, which are threads here: who writes what, and errors that all ranks hear of."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.threads import together
from trainer.errors import StorageError
from trainer.train import writing
from trainer.train.checkpoint import Checkpoints


def tree(step: int) -> dict:
    return {"w": {f"w{i}": torch.full((1000,), float(step + i)) for i in range(8)}, "step": step}


def checkpoints(folder, ranks, **given) -> Checkpoints:
    return Checkpoints(folder, 2, ranks, "run", **given)


def saving(folder, *steps):
    def work(ranks):
        with checkpoints(folder, ranks) as kept:
            for step in steps:
                kept.save(step, tree(step), {"rank": ranks.rank}, durable=True)

    return work


def loading(folder):
    return lambda ranks: checkpoints(folder, ranks).load()


def test_what_all_ranks_hold_is_written_once_and_divided_among_them(tmp_path):
    assert together(3, saving(tmp_path, 10)) == [None] * 3
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*/*.distcp"))]
    assert len(sizes) == 3
    assert max(sizes) < 3 * 4000 + 6000  # of 8 tensors of 4000 bytes none writes more than three
    assert not list(tmp_path.glob("*/part-*"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_resumes_and_the_same_number_gets_its_generators_back(size, tmp_path):
    assert together(2, saving(tmp_path, 10, 20)) == [None] * 2
    for rank, (found, rng) in enumerate(together(size, loading(tmp_path))):
        assert found["step"] == 20
        assert all(torch.equal(found["w"][name], value) for name, value in tree(20)["w"].items())
        assert rng == ({"rank": rank} if size == 2 else None)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("durable", [False, True])
def test_an_error_of_one_rank_is_raised_on_all_and_nothing_half_is_left(failing, durable, tmp_path, monkeypatch):
    assert together(2, saving(tmp_path, 10)) == [None] * 2
    real = writing.Writing._write_share
    hit = threading.Event()

    def refuse(self, rank):
        if rank == failing:
            hit.set()
            raise OSError(28, "No space left on device", str(self.temporary / "x"))
        return real(self, rank)

    monkeypatch.setattr(writing.Writing, "_write_share", refuse)

    def work(ranks):
        with checkpoints(tmp_path, ranks) as kept:
            kept.save(20, tree(20), {}, durable=durable)
            hit.wait(30)
            kept.settle()

    for error in together(2, work):
        assert isinstance(error, StorageError)
        assert "step 20" in error.message
        assert "No space left" in error.message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]


def test_ranks_that_fail_to_read_agree_on_the_error(tmp_path):
    assert together(2, saving(tmp_path, 10)) == [None] * 2

    def work(ranks):
        def like(name, size, dtype):
            if ranks.rank == 1:
                raise RuntimeError("a bug")
            return torch.empty(size, dtype=dtype)

        return checkpoints(tmp_path, ranks).load(like)

    for error in together(2, work):
        assert "is whole, but cannot be read: RuntimeError: a bug" in error.message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]


def test_a_rank_reads_only_the_tensors_that_it_asks_for(tmp_path):
    assert together(2, saving(tmp_path, 10)) == [None] * 2

    def work(ranks):
        wanted = f"/w/w{ranks.rank}"
        return checkpoints(tmp_path, ranks).load(
            lambda name, size, dtype: torch.empty(size) if name == wanted else None
        )

    found = [list(content["w"]) for content, _ in together(2, work)]
    assert found == [["w0"], ["w1"]]
