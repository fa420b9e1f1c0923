"""Before training on several nodes: how fast each pair of ranks exchanges data, and one sum over all of them.

A slow card or cable slows down every step of a whole job, and a dead one ends it after minutes. Here pairs of ranks send
each other a piece of memory to and fro, through the process group that training will use (gloo, or NCCL on GPUs, whose
connections are made by it). Rank 0 prints the speeds, slowest first, and names a rank that is slow; one that does not
answer is an error on every rank. What was found is told by the store, which needs no process group.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from trainer import log
from trainer.parallel.arrivals import PeerLost
from trainer.parallel.rollcall import ALL_PAIRS, HINT, Name, tell

# What a gradient bucket has: summed over all ranks, and the most that a pair exchanges.
BYTES = 25 << 20
# Of the first exchanges of a pair, which tell how much it can send in the time that it has.
SMALL = 64 << 10
PAIR_S = 0.25
LIMIT_S = 20.0
# Slower than the median by this factor is slow.
SLOW = 3.0
LINES = 12

Pair = tuple[int, int]


def preflight(device: torch.device, timeout_s: float, store: Store, names: Sequence[Name]) -> None:
    """Measure pairs of ranks and sum over all; rank 0 says what was found.

    Args:
        device: this rank's device.
        timeout_s: `parallel.timeout_s`, of which at most `LIMIT_S` is waited for a pair.
        store: of this attempt of the job.
        names: of all ranks.

    Raises:
        PeerLost: a rank does not answer, or the sum is wrong.
        RuntimeError: as torch.distributed raises it.
    """
    rank, size, limit = dist.get_rank(), dist.get_world_size(), min(LIMIT_S, timeout_s)
    shared = PrefixStore("preflight", store)
    mine: dict[int, float] = {}
    rounds, start = pairs_by_round(size), time.monotonic()
    for number, pairs in enumerate(rounds):
        shared.set(f"at/{number}/{rank}", "1")
        for one, other in (pair for pair in pairs if rank in pair):
            peer = other if rank == one else one
            left = start + 2 * limit * (number + 1) - time.monotonic()
            there = _comes(shared, f"at/{number}/{peer}", f"gone/{peer}", left)
            mine[peer] = exchange(device, rank, one, other, limit) if there else 0.0
    shared.set(f"speed/{rank}", json.dumps(mine))
    slowest = _judge(shared, rank, names, 2 * limit * (len(rounds) + 1))
    _sum(device, size, limit, min(BYTES, int(slowest * limit / 10)))


def _comes(store: Store, key: str, gone: str, left_s: float) -> bool:
    """Wait for a peer that may still be waiting for a dead one; it is given up for all ranks when its time is over."""
    end = time.monotonic() + left_s
    while not store.check([key]):
        if store.check([gone]):
            return False
        if time.monotonic() > end:
            store.set(gone, "1")
            return False
        time.sleep(0.005)
    return True


def pairs_by_round(size: int) -> list[list[Pair]]:
    """Pairs of ranks, those of a round with no rank in common: all pairs up to `ALL_PAIRS` ranks, of more a ring."""
    if size > ALL_PAIRS:
        ring = [(rank, (rank + 1) % size) for rank in range(size)]
        # The last pair of an odd ring shares a rank with the first.
        return [ring[0 : size - size % 2 : 2], ring[1::2], ring[size - 1 :] if size % 2 else []]
    # The circle method of a round-robin tournament.
    seats = [*range(size), *([-1] if size % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        found = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in found if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def exchange(device: torch.device, rank: int, one: int, other: int, limit: float) -> float:
    """Bytes per second of a pair, each way; 0 if nothing came in `limit` seconds.

    Rank `one` sends and gets back: twice little, which makes the connection and tells how fast it is, then as much as
    takes about `PAIR_S` seconds.
    """
    first, peer = rank == one, other if rank == one else one
    try:
        small = torch.zeros(SMALL // 4, device=device)
        seconds = [_to_and_fro(small, first, peer, limit) for _ in range(2)]
        amount = torch.tensor([min(BYTES, max(SMALL, int(SMALL / seconds[-1] * PAIR_S)))], device=device)
        _send(amount, peer, limit) if first else _receive(amount, peer, limit)
        large = torch.zeros(int(amount) // 4, device=device)
        took = min(_to_and_fro(large, first, peer, limit) for _ in range(2))
    except RuntimeError:
        return 0.0
    return 2 * large.numel() * 4 / took


def _to_and_fro(values: Tensor, first: bool, peer: int, limit: float) -> float:
    """Seconds of a round trip."""
    start = time.perf_counter()
    for sends in (first, not first):
        (_send if sends else _receive)(values, peer, limit)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return max(time.perf_counter() - start, 1e-9)


def _send(values: Tensor, peer: int, limit: float) -> None:
    _wait(dist.isend(values, peer), limit, f"to rank {peer}")


def _receive(values: Tensor, peer: int, limit: float) -> None:
    _wait(dist.irecv(values, peer), limit, f"from rank {peer}")


def _wait(work: dist.Work | None, limit: float, what: str) -> None:
    """Wait for a piece of work, but not for ever.

    Raises:
        RuntimeError: it took longer than `limit` seconds, or failed.
    """
    assert work is not None
    if dist.get_backend() == "gloo":
        work.wait(timedelta(seconds=limit))
        return
    # NCCL does not wait in `wait`, and its watchdog ends the process without a word.
    start = time.monotonic()
    while not work.is_completed():
        if time.monotonic() - start > limit:
            raise RuntimeError(f"preflight: timed out after {limit:g} s: {what}")
        time.sleep(0.0002)
    work.wait()


def _judge(store: Store, rank: int, names: Sequence[Name], limit: float) -> float:
    """Rank 0 tells all what was found; returns the slowest pair's bytes per second.

    Raises:
        PeerLost: a rank does not answer.
    """
    first = ""
    if rank == 0:
        keys = [f"speed/{other}" for other in range(len(names))]
        silent = _silent(store, keys, limit)
        speeds: dict[Pair, float] = {}
        for one in range(len(names)):
            if one not in silent:
                for other, speed in json.loads(store.get(keys[one])).items():
                    pair = (min(one, int(other)), max(one, int(other)))
                    speeds[pair] = min(speed, speeds.get(pair, speed))
        said = dead(speeds, silent, names)
        for line in [] if said else report(speeds, names):
            log.say(line)
        first = json.dumps([said, min(speeds.values(), default=0.0)])
    told = tell(store, rank, len(names), "verdict", first, 2 * limit)
    if told is None:
        raise PeerLost(f"preflight: {names[0]} says nothing any more", HINT)
    said, slowest = json.loads(told)
    if said:
        raise PeerLost(said, HINT)
    return float(slowest)


def _silent(store: Store, keys: Sequence[str], limit: float) -> list[int]:
    """Ranks that give no account in time; none is waited for that others have given up."""
    end, missing = time.monotonic() + limit, list(range(len(keys)))
    while missing and time.monotonic() < end:
        missing = [rank for rank in missing if not store.check([keys[rank]])]
        if all(store.check([f"gone/{rank}"]) for rank in missing):
            break
        time.sleep(0.02)
    return missing


def dead(speeds: Mapping[Pair, float], silent: Sequence[int], names: Sequence[Name]) -> str:
    """Which ranks do not answer, in words; empty if all do.

    Args:
        speeds: pair -> bytes per second, 0 where nothing came.
        silent: ranks that gave no account.
        names: of all ranks.
    """
    broken = [pair for pair, speed in speeds.items() if not speed]
    if not silent and not broken:
        return ""
    # A rank all of whose pairs are broken, unless its pairs are broken because of another such.
    lost = list(silent)
    while left := [pair for pair in broken if not set(pair) & set(lost)]:
        lost.append(max(range(len(names)), key=lambda rank: sum(rank in pair for pair in left)))
    if len(broken) == 1 and not silent:
        one, other = broken[0]
        return f"preflight: no data passes between {names[one]} and {names[other]}"
    return f"preflight: no data comes from {', '.join(str(names[rank]) for rank in sorted(lost))}"


def report(speeds: Mapping[Pair, float], names: Sequence[Name]) -> list[str]:
    """Lines that say how fast the pairs are, slowest first, and who is slow.

    A rank is as fast as its best pair: what is slow about one pair may be the other rank's fault. Pairs within a node and
    between nodes are judged apart.
    """
    if not speeds:
        return []
    slow_ranks, slow_pairs = slow(speeds, names)
    nodes = len({name.node for name in names})
    lines = [
        f"preflight: {len(names)} ranks on {nodes} node{'s' * (nodes > 1)}; GB/s between two, each way, slowest first:"
    ]
    order = sorted(speeds, key=lambda pair: speeds[pair])
    shown = order if len(names) <= ALL_PAIRS else order[:LINES]
    for one, other in shown:
        note = "  slow" if (one, other) in slow_pairs or {one, other} & set(slow_ranks) else ""
        lines.append(f"  {speeds[one, other] / 1e9:>8.3g}  {names[one]} - {names[other]}{note}")
    if len(shown) < len(order):
        median = statistics.median(speeds.values()) / 1e9
        lines.append(f"  {len(order) - len(shown)} more; the median is {median:.3g}")
    hosts = sorted({(names[rank].node, names[rank].host) for rank in slow_ranks})
    for node, host in hosts:
        ranks = [name.rank for name in names if name.node == node]
        guilty = [rank for rank in slow_ranks if rank in ranks]
        whole = f"node {node} ({host})" if guilty == ranks else ", ".join(str(names[rank]) for rank in guilty)
        lines.append(f"preflight: {whole} is slow: less than a third of what the others have; every step waits for it")
    return lines


def slow(speeds: Mapping[Pair, float], names: Sequence[Name]) -> tuple[list[int], list[Pair]]:
    """(ranks that are slow with everybody, further pairs that are)."""
    ranks: set[int] = set()
    pairs: list[Pair] = []
    for within in (True, False):
        kind = {pair: s for pair, s in speeds.items() if (names[pair[0]].node == names[pair[1]].node) is within}
        best: dict[int, float] = {}
        for pair, speed in kind.items():
            for rank in pair:
                best[rank] = max(best.get(rank, 0.0), speed)
        if len(best) < 3:
            continue  # of two, nobody can say which is slow
        usual = statistics.median(best.values())
        found = {rank for rank, speed in best.items() if speed < usual / SLOW}
        ranks |= found
        pairs += [pair for pair, speed in kind.items() if speed < usual / SLOW and not set(pair) & found]
    return sorted(ranks), pairs


def _sum(device: torch.device, size: int, limit: float, amount: int) -> None:
    """Sum some memory over all ranks twice; rank 0 says how long the second took.

    Raises:
        PeerLost: the sum is wrong.
        RuntimeError: it did not come.
    """
    values = torch.ones(max(amount // 4, 1), device=device)
    seconds = 0.0
    for _ in range(2):
        values.fill_(1.0)
        start = time.monotonic()
        work = dist.all_reduce(values, async_op=True)
        while work is not None and not work.is_completed():
            if time.monotonic() - start > limit:
                raise RuntimeError(f"preflight: timed out after {limit:g} s: a sum over all ranks")
            time.sleep(0.001)
        work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - start
    if not bool((values == size).all()):
        raise PeerLost(
            "preflight: a sum over all ranks is wrong",
            "look for a broken network card, or set parallel.nccl.debug=INFO",
        )
    if dist.get_rank() == 0:
        # As nccl-tests count it: what each rank's link carries.
        rate = 2 * (size - 1) / size * values.numel() * 4 / seconds / 1e9
        amount_of = f"{values.numel() * 4 / 2**20:.3g} MiB"
        log.say(f"preflight: {size} ranks summed {amount_of} in {seconds * 1e3:.0f} ms, bus bandwidth {rate:.2f} GB/s")
