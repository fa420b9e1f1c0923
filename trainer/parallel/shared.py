"""Sums over ranks of one machine in memory that they share, several times as fast as gloo's, which go through sockets.

Each rank writes a piece into a slot of its own, says so in a counter, waits for the others' counters, and adds up all slots
by rank, so that every rank gets the same bits. There are two sets of slots, used in turn: a rank that has come to the next
piece has read this one, so one wait for each piece is enough.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
import time
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from trainer.cores import num_cores

# Each rank reads what all have written: with many of them, gloo's ring moves less.
MOST_RANKS = 16
# Pieces of this size stay in a core's cache between being written and being read.
SLOT_BYTES = 1 << 19
# Before the slots, for each rank: how many pieces it has written, whether it has left, and what is in its slots; then what
# tells this memory from others.
WORDS = 8
COUNT, LEFT, KIND = range(3)
TOKEN_BYTES = 16
# A rank that waits keeps its core for about as long as ranks of equal work are apart; then it sleeps in between.
SPIN_S = 0.005
SLEEP_S, LONGEST_SLEEP_S = 50e-6, 1e-3
LOST = "Connection closed by peer: rank {} has left"
# How often a rank that waits sees whether the other one lives.
LOOK_S = 0.1


class SharedMemory:
    """The memory that the ranks of a process group share.

    Args:
        memory: see `join`.
        rank: this rank.
        processes: the ranks' process numbers.
        timeout_s: a wait that takes longer fails.

    Raises:
        RuntimeError: another rank has left already.
    """

    def __init__(self, memory: mmap.mmap, rank: int, processes: list[int], timeout_s: float) -> None:
        self._rank, self._timeout_s, size = rank, timeout_s, len(processes)
        self._words = memoryview(memory)[: mmap.PAGESIZE].cast("q")
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=mmap.PAGESIZE).view(2, size, SLOT_BYTES)
        self._slots = [list(half.unbind()) for half in slots]
        self._sum = torch.empty(SLOT_BYTES, dtype=torch.uint8)
        self._written = 0
        self._spin_s = SPIN_S if size <= num_cores() else 0.0
        self._lives: list[int] = []
        for other, process in enumerate(processes):
            try:
                self._lives.append(os.pidfd_open(process))
            except OSError as error:
                self.close()
                raise RuntimeError(LOST.format(other)) from error

    def close(self) -> None:
        """Leave: others that wait for this rank fail at once."""
        self._words[self._rank * WORDS + LEFT] = 1
        for descriptor in self._lives:
            os.close(descriptor)

    @torch.no_grad()
    def sum(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in place; the same bits on every rank.

        Raises:
            RuntimeError: another rank has left, or took too long.
        """
        whole = [tensor.contiguous() for tensor in tensors]
        for pieces in _pieces([tensor.view(-1) for tensor in whole]):
            sizes, dtype = [piece.numel() for piece in pieces], pieces[0].dtype
            numel = sum(sizes)
            parts = [slot.view(dtype)[:numel] for slot in self._slots[self._written % 2]]
            torch.cat(pieces, out=parts[self._rank])
            self._meet(f"{numel} values of {dtype} to sum")
            total = torch.add(parts[0], parts[1], out=self._sum.view(dtype)[:numel])
            for part in parts[2:]:
                total += part
            torch._foreach_copy_(pieces, torch.split(total, sizes))
        _put_back(tensors, whole)

    @torch.no_grad()
    def same(self, tensors: list[Tensor]) -> None:
        """Give each tensor the value that it has on rank 0.

        Raises:
            RuntimeError: another rank has left, or took too long.
        """
        whole = [tensor.contiguous() for tensor in tensors]
        for pieces in _pieces([tensor.view(-1).view(torch.uint8) for tensor in whole]):
            sizes = [piece.numel() for piece in pieces]
            numel = sum(sizes)
            first = self._slots[self._written % 2][0][:numel]
            if self._rank == 0:
                torch.cat(pieces, out=first)
            self._meet(f"{numel} bytes to be those of rank 0")
            if self._rank != 0:
                torch._foreach_copy_(pieces, torch.split(first, sizes))
        _put_back(tensors, whole)

    def _meet(self, kind: str) -> None:
        """Wait until every rank has written its piece, which must be of the same kind."""
        number, half = zlib.crc32(kind.encode()), KIND + self._written % 2
        self._words[self._rank * WORDS + half] = number
        self._written += 1
        self._words[self._rank * WORDS + COUNT] = self._written
        began = looked = time.monotonic()
        for rank in range(len(self._lives)):
            while not self._is_there(rank):
                now = time.monotonic()
                if now - began < self._spin_s:
                    os.sched_yield()
                    continue
                time.sleep(min(max(SLEEP_S, (now - began) / 100), LONGEST_SLEEP_S))
                if now - looked >= LOOK_S:
                    looked = now
                    self._look(rank, now - began)
            if self._words[rank * WORDS + half] != number:
                raise RuntimeError(f"rank {rank} does not bring to a collective what rank {self._rank} does: {kind}")

    def _is_there(self, rank: int) -> bool:
        return self._words[rank * WORDS + COUNT] >= self._written

    def _look(self, rank: int, waited_s: float) -> None:
        """Raise if the rank that is waited for does not come."""
        lives = select.poll()
        lives.register(self._lives[rank], select.POLLIN)
        # It may have come, and left since.
        if (lives.poll(0) or self._words[rank * WORDS + LEFT]) and not self._is_there(rank):
            raise RuntimeError(LOST.format(rank))
        if waited_s > self._timeout_s:
            raise RuntimeError(f"Timed out after {self._timeout_s:g} s of waiting for rank {rank}")


def join(store: Store, rank: int, size: int, timeout_s: float) -> SharedMemory | None:
    """Meet the other ranks in shared memory; None on every rank where one of them cannot, as on another node.

    The memory has no name: nothing is left of it when the ranks end, however they do.

    Args:
        store: of this attempt alone.
        rank: this rank.
        size: number of ranks.
        timeout_s: a wait for another rank that takes longer fails.
    """
    # Processors of other kinds may show a counter before what it counts.
    ordered = platform.system() == "Linux" and platform.machine() == "x86_64"
    if not 1 < size <= MOST_RANKS or not ordered or os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
        return None
    file, memory, mine = -1, None, ""
    try:
        if rank == 0:
            file = os.memfd_create("millrace")
            os.truncate(file, _bytes(size))
            token = secrets.token_bytes(TOKEN_BYTES)
            os.pwrite(file, token, mmap.PAGESIZE - TOKEN_BYTES)
            store.set("shared", f"{os.getpid()} {file} {token.hex()}")
        else:
            process, number, token_hex = store.get("shared").decode().split()
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            # In another container that number may be another process's.
            if os.pread(file, TOKEN_BYTES, mmap.PAGESIZE - TOKEN_BYTES).hex() != token_hex:
                raise FileNotFoundError
        memory = mmap.mmap(file, _bytes(size))
        os.close(os.pidfd_open(os.getpid()))
        mine = str(os.getpid())
    except (AttributeError, OSError, ValueError):
        # Pythons that were built for old systems lack these functions; old kernels and strict containers refuse them.
        if rank == 0:
            store.set("shared", "")
    try:
        store.set(f"shared/{rank}", mine)
        said = [store.get(f"shared/{other}").decode() for other in range(size)]
    finally:
        if file >= 0:
            os.close(file)
    return SharedMemory(memory, rank, [int(process) for process in said], timeout_s) if memory and all(said) else None


def _bytes(size: int) -> int:
    """Of the memory of so many ranks."""
    return mmap.PAGESIZE + 2 * size * SLOT_BYTES


def _pieces(flat: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one axis in their order, cut into groups of one type that fill a slot."""
    group: list[Tensor] = []
    free = SLOT_BYTES
    for rest in flat:
        while rest.numel():
            fits = free // rest.element_size()
            if group and (fits == 0 or rest.dtype != group[0].dtype):
                yield group
                group, free = [], SLOT_BYTES
                continue
            group.append(rest[:fits])
            free -= group[-1].numel() * rest.element_size()
            rest = rest[fits:]
    if group:
        yield group


def _put_back(tensors: list[Tensor], whole: list[Tensor]) -> None:
    """Give tensors whose memory is not in one piece the values of their copies."""
    for tensor, made in zip(tensors, whole, strict=True):
        if made is not tensor:
            tensor.copy_(made)
