"""Ranks of a process group on this machine: `run_ranks(fault_ranks.main, folder)`.

They come from a fork server that has imported torch and the trainer already, so that a rank starts at once instead of in four
seconds of a processor.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

# One server for all tests of a process: what a first one asks for is what there is. What is not found is imported later.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "trainer.train.fit", "trainer.train.dcp",
        "trainer.parallel.pipeline", "trainer.parallel.tensor", "trainer.tasks.classify", "trainer.tasks.image",
        "trainer.tasks.lm", "trainer.models.decoder", "trainer.models.encoder", "trainer.models.vit",
    ]
)  # fmt: skip


def run_ranks(work: Callable[[Path], None], folder: Path, count: int = 2, deadline_s: float = 180.0) -> None:
    """Call `work(folder)` as each of some ranks that can meet; all must end well. Nothing is left running.

    What a rank says is in log-RANK.txt of the folder, and in the error if it fails.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    processes = [
        FORKS.Process(target=_rank, args=(work, folder, {**environment, "RANK": str(rank)})) for rank in range(count)
    ]
    end = time.monotonic() + deadline_s
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: rank for rank, process in enumerate(processes)}
        while running:
            ended = wait(list(running), max(0.0, end - time.monotonic()))
            assert ended, f"not done in {deadline_s:g} s: ranks {sorted(running.values())}"
            for rank in sorted(running.pop(sentinel) for sentinel in ended):
                processes[rank].join()
                assert processes[rank].exitcode == 0, (folder / f"log-{rank}.txt").read_text()[-4000:]
    finally:
        for process in processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()


def _rank(work: Callable[[Path], None], folder: Path, environment: dict[str, str]) -> None:
    """A rank, in a process group of its own; it ends as ranks of a launch do: threads of torch's may outlive the group."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(folder / f"log-{environment['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
