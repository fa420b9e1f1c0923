"""One trial of a search on a cluster: train once with some values and say what came of it.

python -m trainer trial --params env:MILLRACE_PARAMS --in dataset=URI train.lr=0.01

Katib's collector reads the lines `val_accuracy=0.93` from stdout, one after each evaluation. Nothing is kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from trainer import log, storage
from trainer.artifacts import manifest
from trainer.config import Params
from trainer.errors import EXIT_OK, ConfigError
from trainer.parallel import nodes
from trainer.stage import STAGES, Call, Result


def run(params: Params, inputs: Mapping[str, str]) -> int:
    """Run the trial; returns the exit status.

    Args:
        params: the configuration with the trial's values.
        inputs: `dataset` -> its URI.

    Raises:
        ConfigError: no dataset is named.
        MillraceError: whatever training raises.
    """
    if set(inputs) != {"dataset"}:
        raise ConfigError("trial: needs one input, the dataset", "add --in dataset=URI")
    with tempfile.TemporaryDirectory(prefix="millrace-") as temporary:
        folder = storage.fetch(inputs["dataset"], Path(temporary) / "dataset")
        manifest.read(folder, STAGES["train"].inputs["dataset"].kind)
        call = Call(params, {"dataset": folder}, {}, Path(temporary))
        if params.train.processes > 1 or nodes.here().count > 1:
            from trainer.parallel.launch import launch

            launch(call, "trainer.tune.trial:train")
        else:
            train(call)
    return EXIT_OK


def train(call: Call) -> Result:
    """Train in this process, or as one of its ranks; the first says each value of the metric."""
    from torch import distributed

    from trainer.artifacts.dataset import Dataset
    from trainer.tune.stage import train_once

    first = not distributed.is_initialized() or distributed.get_rank() == 0

    def report(step: int, value: float) -> None:
        if first:
            log.say("", **{call.params.tune.metric: value})

    # No checkpoints: of several nodes each has a folder of its own, and a trial is short.
    best = train_once(call.params, Dataset(call.inputs["dataset"]), {}, report, None)
    report(0, best)
    return Result({call.params.tune.metric: best})
