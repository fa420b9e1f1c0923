"""Sums in shared memory: what they give, and what becomes of a rank that waits for one that does not come."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from tests.ranks import run_ranks
from trainer.parallel import group, shared
from trainer.parallel.group import current, process_group
from trainer.parallel.shared import SharedMemory, join

Made = TypeVar("Made")
CPU = torch.device("cpu")


def together(work: Callable[[SharedMemory, int], Made], ranks: int = 2, timeout_s: float = 60.0) -> list[Made]:
    """What `work` gives on each rank; ranks are threads here."""
    store = HashStore()

    def one(rank: int) -> Made:
        memory = join(store, rank, ranks, timeout_s)
        assert memory
        try:
            return work(memory, rank)
        finally:
            memory.close()

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def of_rank(rank: int) -> list[Tensor]:
    """Tensors of several types and layouts, some larger than a slot."""
    rng = torch.Generator().manual_seed(rank)
    return [
        torch.randn(7, 3, generator=rng),
        torch.randn(3 * shared.SLOT_BYTES // 4 + 5, generator=rng),
        torch.randn((), generator=rng, dtype=torch.float64),
        torch.randn(0, 4, generator=rng),
        torch.randn(300, 1000, generator=rng).t(),
        torch.randn(2, 8, 5, 5, generator=rng).to(memory_format=torch.channels_last),
        torch.randn(9, generator=rng).bfloat16(),
        torch.randint(0, 1 << 40, (4,), generator=rng),
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_are_those_by_rank_bit_for_bit_on_every_rank(ranks: int) -> None:
    def work(memory: SharedMemory, rank: int) -> list[Tensor]:
        tensors = of_rank(rank)
        memory.sum(tensors)
        return tensors

    whole = of_rank(0)
    for rank in range(1, ranks):
        whole = [before + more for before, more in zip(whole, of_rank(rank), strict=True)]
    for found in together(work, ranks):
        for summed, wanted in zip(found, whole, strict=True):
            assert summed.dtype == wanted.dtype
            assert torch.equal(summed, wanted)


def test_every_rank_gets_the_values_of_rank_0() -> None:
    def work(memory: SharedMemory, rank: int) -> list[Tensor]:
        tensors = [*of_rank(rank), torch.tensor(rank == 0), torch.tensor(5 + rank)]
        memory.same(tensors)
        return tensors

    wanted = [*of_rank(0), torch.tensor(True), torch.tensor(5)]
    for found in together(work, 3):
        assert all(torch.equal(given, value) for given, value in zip(found, wanted, strict=True))


def test_ranks_out_of_step_read_no_slot_that_is_written_meanwhile() -> None:
    """One that is late still finds what the others wrote, however fast they are."""

    def work(memory: SharedMemory, rank: int) -> bool:
        right = True
        for turn in range(200):
            if turn % 10 == rank:
                time.sleep(0.002)
            value = torch.full((50,), float(turn + rank))
            memory.sum([value])
            right &= bool((value == 3 * turn + 3).all())
        return right

    assert together(work, 3) == [True] * 3


def test_a_rank_that_takes_too_long_is_named() -> None:
    def work(memory: SharedMemory, rank: int) -> str:
        if rank == 1:
            time.sleep(1.5)
            return ""
        with pytest.raises(RuntimeError) as raised:
            memory.sum([torch.ones(1)])
        return str(raised.value)

    assert together(work, timeout_s=0.3)[0] == "Timed out after 0.3 s of waiting for rank 1"


def test_a_rank_that_leaves_is_named_at_once() -> None:
    def work(memory: SharedMemory, rank: int) -> str:
        memory.sum([torch.ones(1)])
        if rank == 1:
            return ""
        with pytest.raises(RuntimeError) as raised:
            memory.sum([torch.ones(1)])
        return str(raised.value)

    assert together(work)[0] == "Connection closed by peer: rank 1 has left"


def test_ranks_that_bring_different_things_are_told() -> None:
    """An error on every rank, instead of a sum of what does not belong together."""

    def work(memory: SharedMemory, rank: int) -> None:
        memory.sum([torch.ones(3)])
        with pytest.raises(RuntimeError, match=f"rank {1 - rank} does not bring to a collective what rank {rank} does"):
            memory.sum([torch.ones(3), torch.ones(rank)]) if rank else memory.sum([torch.ones(3)])
        with pytest.raises(RuntimeError, match=r"float64 to sum|bytes to be those of rank 0"):
            memory.sum([torch.ones(1, dtype=torch.float64)]) if rank else memory.same([torch.ones(2)])

    together(work)


def ends(place: Path) -> None:
    """As rank 1: end without a word. As rank 0: wait for it."""
    with process_group("auto", 60.0, CPU):
        ranks = current(CPU)
        assert ranks.sum(torch.ones(1)).tolist() == [2.0]
        assert group._shared
        if ranks.rank == 1:
            os._exit(0)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 has left"):
            ranks.sum(torch.ones(1))
        (place / "waited").write_text(str(time.monotonic() - began))


@pytest.mark.parallel
def test_a_process_that_ends_is_found_long_before_the_timeout(tmp_path: Path) -> None:
    run_ranks(ends, tmp_path)
    assert float((tmp_path / "waited").read_text()) < 30


def apart(place: Path) -> None:
    """Ranks that torchrun says are on nodes of their own."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    with process_group("auto", 60.0, CPU):
        ranks = current(CPU)
        model = torch.nn.BatchNorm1d(2)
        torch.nn.init.constant_(model.weight, float(ranks.rank))
        ranks.same_parameters(model)
        found = [group._shared is None, ranks.sum(torch.ones(1)).item(), model.weight.tolist()]
        (place / f"{ranks.rank}.json").write_text(json.dumps(found))


@pytest.mark.parallel
def test_ranks_of_several_nodes_use_gloo(tmp_path: Path) -> None:
    run_ranks(apart, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [True, 2.0, [0.0, 0.0]]


@pytest.mark.parametrize("broken", ["memfd_create", "pidfd_open", "open", "mmap"])
def test_if_one_rank_cannot_share_none_does(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python for old systems, an old kernel, a container's profile: all take gloo then."""
    store = HashStore()
    opened, mapped, first = os.open, mmap.mmap, iter([True, False])

    def refuse(*args: object) -> int:
        raise PermissionError

    if broken == "mmap":
        monkeypatch.setattr(mmap, "mmap", lambda *args: refuse() if next(first) else mapped(*args))
    elif broken == "open":
        monkeypatch.setattr(os, "open", lambda path, *rest: refuse() if "/fd/" in str(path) else opened(path, *rest))
    else:
        monkeypatch.delattr(os, broken)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: join(store, rank, 2, 5.0), range(2))) == [None, None]
