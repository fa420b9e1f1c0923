"""What the ranks of a host need before they connect: NCCL's variables, the network interface, room in /dev/shm."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from trainer.config.parallel import Nccl
from trainer.errors import ConfigError

SHARED = Path("/dev/shm")  # noqa: S108 - where NCCL and DataLoader put what processes share
# What container runtimes give is 64 MiB in all; NCCL takes some ten for each pair of ranks, and says no more than "unhandled
# system error" when there is no room.
SHARED_PER_RANK = 64 << 20


def set_variables(nccl: Nccl, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of `parallel.nccl` that the environment does not set itself.

    Raises:
        ConfigError: no interface of this host has the name that is asked for.
    """
    values = {
        "NCCL_SOCKET_IFNAME": nccl.socket_ifname,
        "NCCL_IB_HCA": nccl.ib_hca,
        "NCCL_IB_DISABLE": "1" if nccl.ib_disable else "",
        "NCCL_P2P_DISABLE": "1" if nccl.p2p_disable else "",
        "NCCL_ALGO": nccl.algo,
        "NCCL_DEBUG": nccl.debug,
    }
    for name, value in values.items():
        if value:
            environment.setdefault(name, value)
    if nccl.socket_ifname and "GLOO_SOCKET_IFNAME" not in environment:
        environment["GLOO_SOCKET_IFNAME"] = interface(nccl.socket_ifname)


def interface(pattern: str, names: Sequence[str] | None = None) -> str:
    """The first interface that NCCL_SOCKET_IFNAME means; gloo knows only whole names, of which it takes one.

    Args:
        pattern: prefixes of names, `^` before those that are not meant, `=` before whole names.
        names: of this host's interfaces; by default, those that it has.

    Raises:
        ConfigError: there is none.
    """
    there = [name for _, name in socket.if_nameindex()] if names is None else list(names)
    without, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    words = [word for word in pattern.lstrip("^=").split(",") if word]
    for name in there:
        met = any(name == word if exact else name.startswith(word) for word in words)
        if met is not without and not (without and name == "lo"):
            return name
    raise ConfigError(
        f"parallel.nccl.socket_ifname: {pattern!r} is none of this host's interfaces ({', '.join(there)})",
        "name one of them, or leave it empty",
    )


def shared_memory_is_small(local_ranks: int, place: Path = SHARED) -> str:
    """What is wrong with the room for memory that the ranks of a host share, and its cure; empty if nothing is."""
    if local_ranks < 2 or os.environ.get("NCCL_SHM_DISABLE") == "1":
        return ""
    try:
        found = os.statvfs(place)
    except OSError:
        return ""
    free, needed = found.f_bavail * found.f_frsize, local_ranks * SHARED_PER_RANK
    if free >= needed:
        return ""
    return (
        f"{place}: {free >> 20} MiB are free, and {local_ranks} ranks with a GPU each want {needed >> 20}: NCCL may fail for want"
        " of it; in a pod, mount an emptyDir with medium: Memory there (cluster.shm), with docker use --shm-size"
    )
