"""Before training on several nodes: one sum over all ranks, timed, so that a broken network is found in seconds."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from trainer import log
from trainer.parallel.arrivals import PeerLost

# What a gradient bucket has.
BYTES = 25 << 20
LIMIT_S = 60.0


def preflight(device: torch.device, timeout_s: float) -> None:
    """Sum 25 MiB over all ranks twice; rank 0 says how long the second took.

    Args:
        device: this rank's device.
        timeout_s: `parallel.timeout_s`, of which at most `LIMIT_S` is waited.

    Raises:
        PeerLost: the sum did not come, or is wrong.
        RuntimeError: as torch.distributed raises it.
    """
    size = dist.get_world_size()
    values = torch.ones(BYTES // 4, device=device)
    seconds = 0.0
    for _ in range(2):
        values.fill_(1.0)
        start = time.monotonic()
        work = dist.all_reduce(values, async_op=True)
        # NCCL does not wait in `wait`, and its watchdog ends the process without a word.
        while not work.is_completed():
            if time.monotonic() - start > min(LIMIT_S, timeout_s):
                raise RuntimeError(f"preflight: timed out after {min(LIMIT_S, timeout_s):g} s: a sum over all ranks")
            time.sleep(0.001)
        work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - start
    if not bool((values == size).all()):
        raise PeerLost(
            "preflight: a sum over all ranks is wrong", "look for a broken network card, or set NCCL_DEBUG=INFO"
        )
    if dist.get_rank() == 0:
        rate = BYTES / seconds / 1e9
        log.say(f"preflight: {size} ranks summed {BYTES >> 20} MiB in {seconds * 1e3:.0f} ms ({rate:.2f} GB/s)")
