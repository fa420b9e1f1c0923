"""The ranks that train together, as one small object: collectives in a process group, nothing at all in one process.

The loop calls the same methods either way, so it holds no `if distributed`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from trainer.parallel.arrivals import Arrivals, PeerLost, Unanswered
from trainer.parallel.nodes import GENERATION
from trainer.parallel.preflight import preflight
from trainer.parallel.rollcall import roll_call
from trainer.parallel.shared import SharedMemory, join

# Gradients are summed in flat pieces of about this many bytes: few collectives, bounded extra memory. They are summed after
# the backward pass, not during it: on CPUs that saves nothing, as the sums take the same cores (plans with ZeRO overlap).
BUCKET_BYTES = 25 << 20
# Ranks that wait for the same collective give up within a second of each other.
SILENT_S = 5.0
IN_GROUP = re.compile(r"(?i)gloo|nccl|c10d|connection closed by peer")
HINT = (
    "look at what it waits for (a disk, a network, a debugger); if it is only slow, raise parallel.timeout_s; the same "
    "command resumes from the newest checkpoint"
)


class Ranks:
    """One process, alone: every collective is the identity."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks; every rank gets the same bits."""
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the ranks, in place; a missing gradient counts as zero."""

    def same_parameters(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""

    def same_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers (running means and the like) of rank 0."""

    def gather(self, value: Any) -> list[Any]:
        """The plain value of each rank, by rank, on every rank."""
        return [value]

    def from_first(self, value: Any) -> Any:
        """The plain value of rank 0, on every rank."""
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""


class Group(Ranks):
    """The ranks of the process group that torch.distributed has."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        self._shared = _shared if device.type == "cpu" else None

    def _come(self) -> None:
        """Note that this rank is at the next collective."""
        if _arrivals:
            _arrivals.come()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the ranks; every rank gets the same bits."""
        self._come()
        moved = values.to(self.device, copy=True)
        self._sum([moved])
        return moved.to(values.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the ranks, in place; a missing gradient counts as zero."""
        self._come()
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._sum([parameter.grad for parameter in parameters if parameter.grad is not None])

    def _sum(self, tensors: list[Tensor]) -> None:
        """Sum tensors over the ranks, in place."""
        if self._shared:
            self._shared.sum(tensors)
        else:
            sum_tensors(tensors)

    def same_parameters(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        self._come()
        self._same([*model.parameters(), *model.buffers()])

    def same_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers (running means and the like) of rank 0."""
        self._come()
        self._same(list(model.buffers()))

    def _same(self, tensors: list[Tensor]) -> None:
        """Give tensors the values of rank 0."""
        if self._shared:
            self._shared.same(tensors)
            return
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """The plain value of each rank, by rank, on every rank."""
        self._come()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The plain value of rank 0, on every rank."""
        self._come()
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._come()
        dist.barrier()


def subgroup(parts: list[list[int]], timeout_s: float) -> dist.ProcessGroup:
    """The group of those ranks, of `parts` of all ranks, that this rank is one of; all ranks call it with the same parts."""
    found = dist.new_subgroups_by_enumeration(parts, timeout=timedelta(seconds=timeout_s))[0]
    assert isinstance(found, dist.ProcessGroup)
    return found


def sum_tensors(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum tensors over a group's ranks (all ranks without one), in place."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, in groups of one type and of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size >= BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


def current(device: torch.device) -> Ranks:
    """The ranks of the process group if there is one, else this process alone."""
    return Group(device) if dist.is_available() and dist.is_initialized() else Ranks()


# Of this process's group; set while there is one.
_arrivals: Arrivals | None = None
_shared: SharedMemory | None = None


@contextmanager
def process_group(
    backend: str, timeout_s: float, device: torch.device, arrivals: Path | None = None, check: bool = False
) -> Iterator[None]:
    """Join the process group that torchrun's variables describe; leave it at the end.

    torchrun's own store outlives an attempt, and ranks of the next attempt would read the dead one's addresses there.
    So each attempt has a prefix of its own in the store.

    Args:
        backend: gloo, nccl or auto (nccl on GPUs; else gloo, and memory that ranks of one machine share).
        timeout_s: a collective that takes longer fails.
        device: this rank's device.
        arrivals: file in which the local ranks note what they have come to, see `trainer.parallel.arrivals`.
        check: first see that all ranks are there and reach each other, then measure how fast they do.

    Raises:
        Unanswered: a collective took too long.
        PeerLost: another rank is gone, or did not pass the check.
    """
    global _arrivals, _shared
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generation = os.environ.get(GENERATION, "")
    attempt = generation or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    chosen = backend if backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
    _arrivals = Arrivals(arrivals, rank, int(attempt)) if arrivals else None
    timeout = timedelta(seconds=timeout_s)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: Store | None = None
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=size,
            is_master=rank == 0 and not hosted,
            timeout=timeout,
            wait_for_workers=False,
        )
        shared = PrefixStore(f"millrace/attempt{attempt}", store)
        names = roll_call(shared, rank, size, timeout_s) if check else []
        dist.init_process_group(chosen, store=shared, rank=rank, world_size=size, timeout=timeout)
        try:
            if check:
                preflight(device, timeout_s, shared, names)
            if backend == "auto" and device.type == "cpu":
                _shared = join(shared, rank, size, timeout_s)
            yield
        finally:
            if _shared:
                _shared.close()
            dist.destroy_process_group()
    except RuntimeError as error:
        if not _is_of_group(error):
            raise
        if _is_timeout(error):
            last = _arrivals.last() if _arrivals else _silent(store, f"silent{attempt}", rank, size)
            raise Unanswered(f"rank {rank}: a collective took longer than {timeout_s:g} s", HINT, last) from error
        if not generation:
            raise
        message = f"rank {rank}: lost the connection to another rank: {str(error).splitlines()[0]}"
        raise PeerLost(message, "the same command resumes from the newest checkpoint") from error
    finally:
        _arrivals = _shared = None


def _is_of_group(error: RuntimeError) -> bool:
    """Whether a collective or the store has failed; torch has no class for that."""
    frame = error.__traceback__
    while isinstance(frame, TracebackType) and frame.tb_next:
        frame = frame.tb_next
    module = str(frame.tb_frame.f_globals.get("__name__", "")) if frame else ""
    # Collectives of FSDP and DTensor fail inside of autograd: only the message says what has.
    return module.startswith(("trainer.parallel", "torch.distributed")) or bool(IN_GROUP.search(str(error)))


def _is_timeout(error: RuntimeError) -> bool:
    return bool(re.search(r"(?i)time[d ]*out", str(error)))


def _silent(store: Store | None, prefix: str, rank: int, size: int) -> list[int]:
    """The ranks that do not give up as this one does: the others wait for them. Ranks of several nodes share no memory."""
    if store is None:
        return []
    end = time.monotonic() + SILENT_S
    missing = list(range(size))
    with suppress(RuntimeError):
        store.set(f"{prefix}/{rank}", "1")
        while missing and time.monotonic() < end:
            missing = [other for other in missing if not store.check([f"{prefix}/{other}"])]
            time.sleep(0.1)
    return missing
