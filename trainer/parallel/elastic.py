"""torchrun's agent in a pod that trains with others: it meets them in our lobby, and knows whose fault an end is.

Ranks that fail because another node is gone are no failure of this node: they do not count towards
`parallel.max_restarts`. A permanent error (a wrong parameter, divergence) is not tried again at all.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.launcher import api

from trainer import log
from trainer.parallel import made, nodes
from trainer.parallel.launch import FROM_OUTSIDE, SPEC, TRANSIENT, read_errors
from trainer.parallel.lobby import BACKEND, Lobby

# Ranks whose peer is gone hang in a collective and cannot save: they are ended after so many seconds.
STOP_S = 3
# The ranks of all nodes have ended well, and their agents know it; one that does not say so any more has been lost.
EXIT_BARRIER_S = 10.0
# Generations that end within `QUICK_S`, one after the other: the cause is not that nodes come and go.
QUICK, QUICK_S = 10, 30.0


def install(place: Path) -> None:
    """Have torchrun use this agent and the lobby. `place` is the launch's folder, see `trainer.parallel.launch`."""

    class Agent(_Agent):
        where = place

    rendezvous_handler_registry.register(BACKEND, _lobby)
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]  # what launch_agent makes; it takes no other


def _lobby(parameters: RendezvousParameters) -> Lobby:
    return Lobby(nodes.here())


class _Agent(LocalElasticAgent):
    """The agent of one node. Overrides what torch's own (2.11 to 2.15) does after a failure."""

    where: Path

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "exit_barrier_timeout": EXIT_BARRIER_S})
        self._started = time.monotonic()
        self._quick = 0
        self._done: RunResult | None = None

    def _initialize_workers(self, worker_group: Any) -> None:
        super()._initialize_workers(worker_group)
        self._started = time.monotonic()
        self._done = None

    def _stop_workers(self, worker_group: Any) -> None:
        self._shutdown(timeout=STOP_S)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result: RunResult = self._done or super()._monitor_workers(worker_group)
        if result.state is WorkerState.SUCCEEDED:
            return self._with_others(result, worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._remaining_restarts = self._judge([failure.exitcode for failure in result.failures.values()])
        return result

    def _with_others(self, result: RunResult, worker_group: Any) -> RunResult:
        """The success of this node's ranks, once it is that of all nodes, or what they had to make is there.

        Until then its ranks count as running: torchrun goes on asking the lobby, and a node that was lost meanwhile finds
        all others when it is back. Their ranks begin again from the newest checkpoint.
        """
        store: Any = self._store
        try:
            if self._done is None:
                store.set(f"done/{worker_group.group_rank}", "1")
                self._done = result
            if self._is_made() or store.check([f"done/{rank}" for rank in range(worker_group.group_world_size)]):
                return result
        except RuntimeError:  # its host is gone, as the lobby will find
            pass
        return RunResult(state=WorkerState.HEALTHY)

    def _is_made(self) -> bool:
        """Whether no other node is needed any more: whoever comes back finds its work done."""
        try:
            spec = json.loads((self.where / SPEC).read_bytes())
        except OSError:
            return False
        return made.is_kept(Path(spec["scratch"]))

    def _judge(self, exit_codes: list[int]) -> int:
        """Restarts that remain before torchrun takes one for this failure."""
        remaining = int(self._remaining_restarts)
        found = list(read_errors(self.where).values())
        if any(error["kind"] not in TRANSIENT for error in found) or self._is_made():
            return 0
        self._quick = self._quick + 1 if time.monotonic() - self._started < QUICK_S else 0
        # A rank that a signal has ended writes nothing; torchrun itself ends the others by SIGTERM.
        own = any(code < 0 and code != -signal.SIGTERM for code in exit_codes)
        if own or not found or self._quick > QUICK or any(error["kind"] not in FROM_OUTSIDE for error in found):
            return remaining
        hung = sorted({rank for error in found for rank in error.get("last", [])})
        who = f"; in vain for rank {', '.join(map(str, hung))}" if hung else ""
        log.say(f"node {nodes.here().rank}: {found[0]['message'].splitlines()[0]}{who}; waiting for all nodes")
        return remaining + 1
