"""Where the pods of a job meet: a rendezvous for torchrun with a fixed number of nodes, each with a fixed rank.

torchrun's own c10d rendezvous learns that a pod was replaced only when its keep-alive runs out, and its store hands the
ranks of the next attempt the addresses of the last one. Here a *generation* of the group is a row of seats in the store of
node 0, one per node. Whoever finds its own seat taken (it is the successor of a lost pod), or whose ranks have failed,
breaks the generation; the others notice within a second, and all sit down in the next one. A store that is gone means that
node 0 is: the others wait for its successor. Nothing of an old generation is ever read in a new one.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from trainer import log
from trainer.errors import MillraceError
from trainer.parallel.nodes import GENERATION, Node

BACKEND = "millrace"
# An image of several gigabytes on a new machine.
JOIN_S = 3600.0
_POLL_S = 0.2
_SAY_S = 30.0
# An answer of the store takes milliseconds; longer means that its host is gone.
_ANSWER = timedelta(seconds=10)
_PROBE_S = 1.0
_NONE = -1


class NodesMissing(MillraceError):
    """Not all nodes came; worth another try."""

    exit_code = 128 + signal.SIGKILL


class Lobby(RendezvousHandler):
    """The rendezvous of one node's torchrun.

    Args:
        node: this node.
        join_s: how long to wait for the other nodes, their machines and images included.
        connect: makes the store, which node 0 hosts; raises RuntimeError while it cannot be reached.
    """

    def __init__(self, node: Node, join_s: float = JOIN_S, connect: Callable[[], Store] | None = None) -> None:
        self.node, self.join_s = node, join_s
        # On node 0 its own name may not be resolved yet.
        self._host = "127.0.0.1" if node.rank == 0 else node.host
        self.generation = _NONE
        self._connect = connect or self._tcp_store
        self._store: Store | None = None
        # Another process in this node's place, even under its host's name, is not this one.
        self._token = uuid.uuid4().hex
        self._asked = 0.0

    def get_backend(self) -> str:
        """The name under which torchrun knows it."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """The ranks join the store that node 0's agent hosts."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Leave the present generation, if any, and wait until all nodes sit in a new one.

        Raises:
            NodesMissing: some did not come in time; the message names them.
        """
        start = said = time.monotonic()
        left, missing = self.generation, list(range(self.node.count))
        while time.monotonic() - start < self.join_s:
            try:
                if self._store is None:
                    self._store, left = self._connect(), _NONE
                generation = self._sit_down(self._store, left)
                missing = self._empty(self._store, generation)
                if not missing and not _is_broken(self._store, generation):
                    return self._joined(self._store, generation)
            except RuntimeError:  # torch's DistError: the store's host is not there, not there yet, or gone
                self._store = None
            if time.monotonic() - said > _SAY_S:
                said = time.monotonic()
                log.say(f"waiting for {_named(missing)} of {self.node.count}")
            time.sleep(_POLL_S)
        raise NodesMissing(
            f"{_named(missing)} of {self.node.count} did not come in {self.join_s:g} s",
            "see why its pod does not run: kubectl describe pod, kubectl logs",
        )

    def num_nodes_waiting(self) -> int:
        """1 if the generation is over: torchrun then stops its ranks and comes to `next_rendezvous`."""
        if time.monotonic() - self._asked < _POLL_S:
            return 0
        self._asked = time.monotonic()
        try:
            return int(self._store is None or _is_broken(self._store, self.generation))
        except RuntimeError:
            self._store = None
            return 1

    def is_closed(self) -> bool:
        """Never: a lost pod has a successor."""
        return False

    def set_closed(self) -> None:
        """There is nothing to close."""

    def get_run_id(self) -> str:
        """The generation, for torchrun's own messages."""
        return str(self.generation)

    def shutdown(self) -> bool:
        """Called when torchrun ends in order; the others learn of anything else from the generation or the store."""
        return True

    def _tcp_store(self) -> Store:
        host, first = self._host, self.node.rank == 0
        if not first:
            # TCPStore would wait, ever longer, for a host that is not there yet: a lost pod's name is unknown for a while.
            try:
                socket.create_connection((host, self.node.port), timeout=_PROBE_S).close()
            except OSError as error:
                raise RuntimeError(f"{host}:{self.node.port}: {error}") from error
        return TCPStore(host, self.node.port, is_master=first, wait_for_workers=False, timeout=_ANSWER)

    def _sit_down(self, store: Store, left: int) -> int:
        """Take this node's seat in the current generation; returns that generation.

        Args:
            store: where the seats are.
            left: the generation that this node has left, which is over.
        """
        while True:
            current = int(store.compare_set("generation", "", "0"))
            seated = current != left and not _is_broken(store, current)
            if seated and store.compare_set(_seat(current, self.node.rank), "", self._token).decode() == self._token:
                return current
            store.add(f"broken/{current}", 1)
            store.compare_set("generation", str(current), str(current + 1))

    def _empty(self, store: Store, generation: int) -> list[int]:
        return [rank for rank in range(self.node.count) if not store.check([_seat(generation, rank)])]

    def _joined(self, store: Store, generation: int) -> RendezvousInfo:
        if generation:
            log.say(f"node {self.node.rank}: all {self.node.count} nodes are here again")
        self.generation = generation
        # Inherited by the ranks: each generation has a prefix of its own in the store.
        os.environ[GENERATION] = str(generation)
        where = RendezvousStoreInfo(self._host, self.node.port)
        return RendezvousInfo(PrefixStore(f"agents/{generation}", store), self.node.rank, self.node.count, where)


def _seat(generation: int, rank: int) -> str:
    return f"seat/{generation}/{rank}"


def _is_broken(store: Store, generation: int) -> bool:
    return bool(store.add(f"broken/{generation}", 0) > 0)


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"node{'s' * (len(ranks) != 1)} {names}"
