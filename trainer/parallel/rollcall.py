"""Before ranks of several nodes connect: who is there, and who reaches whom, by TCP and the store alone.

Process groups of torch connect all at once, and say after minutes that some connection was not made. Here each rank says
that it is there and listens at its own address; then each tries the others, and rank 0 tells all what was found. So a rank
that does not come, and a host that is cut off, are named before anything else is tried.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from trainer.parallel.arrivals import PeerLost

# A connection in one's own network takes milliseconds.
CONNECT_S = 5.0
HEARD_S = 2.0
# Up to so many ranks each tries all others, of more the next few.
ALL_PAIRS, NEXT = 8, 2
# linux/sockios.h: the address of an interface.
SIOCGIFADDR = 0x8915
HINT = (
    "look at that pod and its node (kubectl describe pod); all ports must be open between the pods, and"
    " parallel.nccl.socket_ifname can name the network's interface"
)


@dataclass(frozen=True)
class Name:
    """What a rank is called: its number, and the node and host that it is on."""

    rank: int
    node: int
    host: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node}{', ' * bool(self.host)}{self.host})"


def node_of(rank: int) -> int:
    """The node that a rank is on; all nodes have as many."""
    return rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def roll_call(store: Store, rank: int, size: int, timeout_s: float) -> list[Name]:
    """Wait until all ranks are there, and see that they reach each other; the names of all.

    Args:
        store: of this attempt of the job.
        rank: this rank.
        size: ranks in all.
        timeout_s: how long to wait for the others.

    Raises:
        PeerLost: some did not come, or cannot be reached: the same message on every rank.
    """
    shared = PrefixStore("rollcall", store)
    family, address = own_address()
    with socket.create_server((address, 0), family=family, backlog=size) as listening:
        mine = {"node": node_of(rank), "host": socket.gethostname(), "at": listening.getsockname()[:2]}
        shared.set(f"here/{rank}", json.dumps(mine))
        names, places = _assemble(shared, rank, size, timeout_s)
        failed = [other for other in _tried(rank, size) if not _reaches(places[other])]
        shared.set(f"reached/{rank}", json.dumps(failed))
        _conclude(shared, rank, names, timeout_s)
    return names


def _assemble(store: Store, rank: int, size: int, timeout_s: float) -> tuple[list[Name], list[tuple[str, int]]]:
    """Names and addresses of all ranks.

    Raises:
        PeerLost: some did not come.
    """
    keys = [f"here/{other}" for other in range(size)]
    first = json.dumps(absent(store, keys, timeout_s)) if rank == 0 else ""
    # Rank 0 waits as long as this one, and then has to say so.
    told = tell(store, rank, size, "missing", first, timeout_s + CONNECT_S)
    missing = [0] if told is None else json.loads(told)
    if missing:
        who = ", ".join(str(Name(other, node_of(other))) for other in missing[:8])
        raise PeerLost(
            f"preflight: {who} did not come in {timeout_s:g} s; {size - len(missing)} of {size} are there", HINT
        )
    found = [json.loads(store.get(key)) for key in keys]
    return [Name(i, each["node"], each["host"]) for i, each in enumerate(found)], [tuple(each["at"]) for each in found]


def absent(store: Store, keys: Sequence[str], timeout_s: float) -> list[int]:
    """Places of the keys that are not set after so many seconds."""
    end, missing = time.monotonic() + timeout_s, list(range(len(keys)))
    while True:
        missing = [place for place in missing if not store.check([keys[place]])]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.02)


def _tried(rank: int, size: int) -> list[int]:
    if size <= ALL_PAIRS:
        return [other for other in range(size) if other != rank]
    return [(rank + step) % size for step in range(1, NEXT + 1)]


def _reaches(place: tuple[str, int]) -> bool:
    end = time.monotonic() + CONNECT_S
    while time.monotonic() < end:
        with suppress(OSError):
            socket.create_connection(place, timeout=max(end - time.monotonic(), 0.01)).close()
            return True
        time.sleep(0.05)
    return False


def _conclude(store: Store, rank: int, names: Sequence[Name], timeout_s: float) -> None:
    """Rank 0 gathers who reaches whom and tells all; raise it if something is wrong."""
    size, limit, said = len(names), CONNECT_S * ALL_PAIRS, ""
    if rank == 0:
        keys = [f"reached/{other}" for other in range(size)]
        silent = absent(store, keys, limit)
        failed = {i: json.loads(store.get(key)) for i, key in enumerate(keys) if i not in silent}
        said = verdict(failed, silent, names)
    told = tell(store, rank, size, "verdict", said, timeout_s + limit)
    if told is None:
        told = f"preflight: {names[0]} says nothing any more"
    if told:
        raise PeerLost(told, HINT)


def tell(store: Store, rank: int, size: int, key: str, said: str, timeout_s: float) -> str | None:
    """What rank 0 says, on every rank; None where it says nothing for so many seconds.

    The store may end with rank 0, which therefore waits for a moment until all have heard it.
    """
    if rank == 0:
        store.set(key, said)
        absent(store, [f"{key}/heard/{other}" for other in range(1, size)], HEARD_S)
        return said
    if absent(store, [key], timeout_s):
        return None
    found = store.get(key).decode()
    store.set(f"{key}/heard/{rank}", "1")
    return found


def verdict(failed: dict[int, list[int]], silent: Sequence[int], names: Sequence[Name]) -> str:
    """What is wrong with the connections, in words; empty if nothing is.

    Args:
        failed: rank -> the ranks that it does not reach.
        silent: ranks that stopped to answer.
        names: of all ranks.
    """
    if silent:
        return f"preflight: {', '.join(str(names[rank]) for rank in silent)} came and then fell silent"
    broken = [(rank, other) for rank, others in failed.items() for other in others]
    if not broken:
        return ""
    size, found = len(names), {frozenset(pair) for pair in broken}
    for node in sorted({name.node for name in names}):
        ranks = {name.rank for name in names if name.node == node}
        crossing = {frozenset((one, other)) for one in range(size) for other in _tried(one, size)}
        crossing = {pair for pair in crossing if len(pair & ranks) == 1}
        # Of two nodes, nobody can say which one is cut off.
        if found == crossing and len({name.node for name in names}) > 2:
            host, who = names[min(ranks)].host, ", ".join(map(str, sorted(ranks)))
            return f"preflight: node {node} ({host}) with rank {who} is cut off from the others"
    pairs = "; ".join(f"{names[one]} does not reach {names[other]}" for one, other in broken[:4])
    return f"preflight: {pairs}"


def own_address() -> tuple[socket.AddressFamily, str]:
    """Family and address of this host in the network in which the ranks meet."""
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if wanted and sys.platform == "linux":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            request = struct.pack("256s", wanted.encode()[:15])
            found = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
            return socket.AF_INET, found
    for host in (os.environ["MASTER_ADDR"], socket.gethostname()):
        with suppress(OSError):
            family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                # No packet is sent: it asks for the route.
                probe.connect(place)
                found = str(probe.getsockname()[0])
            if found not in ("127.0.0.1", "::1"):
                return socket.AddressFamily(family), found
    return socket.AF_INET, "127.0.0.1"
