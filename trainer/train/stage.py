"""The stage `train`: a dataset, and the best parameters of a search if there was one, to a model folder."""

from __future__ import annotations

from trainer import log
from trainer.errors import OutOfMemory
from trainer.monitor.trackers import check
from trainer.parallel import nodes
from trainer.stage import Call, Result


def run(call: Call) -> Result:
    """Train in this process, or under torchrun on `train.processes` local ranks of each node that trains along.

    Raises:
        MillraceError: bad parameters or data, divergence, preemption, a dead rank.
    """
    check(call.params.monitor)
    while True:
        try:
            return _run(call)
        except OutOfMemory as error:
            # Each attempt takes less than the one before, until there is nothing left to try. Of several nodes this one
            # cannot begin again alone: its exit status has all of them do it.
            if nodes.here().count > 1:
                raise
            log.say(f"{error.message}: starting again from the newest checkpoint, with less")


def _run(call: Call) -> Result:
    # Each imports what it needs: a launcher has no use for torch.
    if call.params.train.processes > 1 or nodes.here().count > 1:
        from trainer.parallel.launch import launch

        return launch(call)
    from trainer.train.produce import train

    return train(call)
