"""The stage `train`: a dataset, and the best parameters of a search if there was one, to a model folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from trainer import log
from trainer.config import Params
from trainer.config.load import with_values
from trainer.errors import ArtifactError, OutOfMemory
from trainer.monitor.trackers import check
from trainer.parallel import nodes
from trainer.stage import Call, Result


def run(call: Call) -> Result:
    """Train in this process, or under torchrun on `train.processes` local ranks of each node that trains along.

    Raises:
        MillraceError: bad parameters or data, divergence, preemption, a dead rank.
    """
    check(call.params.monitor)
    call = replace(call, params=tuned(call.params, call.inputs.get("tuning")))
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


def tuned(params: Params, tuning: Path | None) -> Params:
    """The parameters with the best values of a search, if there was one.

    Raises:
        ArtifactError: best.json is missing or not what tune writes.
    """
    if tuning is None:
        return params
    path = tuning / "best.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["params"]
        assert isinstance(values, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ArtifactError(f"{path}: not the result of a search", "run the stage tune again") from None
    return with_values(params, values) if values else params
