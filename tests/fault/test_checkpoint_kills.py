"""Kills at random moments while checkpoints are saved without a pause: the newest one always loads.

The saver writes 24 tensors of 1 MB, changes them as soon as `save` returns, and says what is durable. It comes from a
fork server that has imported torch, so that a kill costs a fraction of a second. `make fault` draws a sample; all 500:
`make fault FULL=1`, and a failure again with the SEED that it prints.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
import torch

from tests import grid
from tests.ranks import FORKS
from trainer.parallel.group import Ranks
from trainer.train.checkpoint import Checkpoints

pytestmark = [pytest.mark.fault, pytest.mark.slow]

DEADLINE = 60.0


def saver(folder: str, first: int, said) -> None:
    """Save step after step until killed; every other one in the background, with the tensors changed meanwhile."""
    from pathlib import Path

    tensors = {f"t{number}": torch.empty(250_000) for number in range(24)}
    with Checkpoints(Path(folder), 2, Ranks(), "run") as kept:
        said.send(-1)
        for step in range(first, first + 10**6):
            for tensor in tensors.values():
                tensor.fill_(float(step))
            kept.save(step, {"t": tensors, "step": step}, {}, durable=bool(step % 2), best=step % 5 == 0)
            for tensor in tensors.values():
                tensor.fill_(-1.0)
            kept.settle()
            said.send(step)


def last_said(pipe) -> int:
    step = -1
    with contextlib.suppress(EOFError):
        while pipe.poll():
            step = max(step, pipe.recv())
    return step


def test_no_kill_leaves_nothing_that_loads(tmp_path):
    seed, count = grid.seed(), grid.cases(25, 500)
    random_ = random.Random(seed)
    newest = 0
    for number in range(count):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=saver, args=(str(tmp_path), newest + 1, theirs))
        process.start()
        theirs.close()
        try:
            assert ours.poll(DEADLINE)
            delay = random_.uniform(0.0, 0.6)
            print(f"SEED={seed} kill {number}: {delay:.4f} s after step {newest}")
            time.sleep(delay)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.join(DEADLINE)
        durable = max(newest, last_said(ours))
        ours.close()
        found = Checkpoints(tmp_path, 2, Ranks(), "run").load()
        if found is None:
            assert durable == 0, "what was durable is gone"
            continue
        step = found[0]["step"]
        assert step >= durable, "an older one came back"
        assert all(bool((tensor == step).all()) for tensor in found[0]["t"].values()), "not the state at its step"
        assert not [path.name for path in tmp_path.glob("bad-*")], "a kill is no damage"
        newest = step
    assert newest > count // 10, "the kills came before anything was saved"
