"""One rank of a group that trains again and again, with a fault in each: `run_ranks(fault_ranks.main, place)`.

Reads PLACE/data, writes PLACE/rank-N.json: for each case its outcome (losses, events, digest of the weights, or the error).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch

from trainer import models
from trainer.artifacts.dataset import Dataset
from trainer.config.load import load
from trainer.errors import MillraceError
from trainer.parallel.group import process_group
from trainer.tasks.classify import Classify
from trainer.train import inject
from trainer.train.fit import fit
from trainer.train.state import seed_all

WORDS = [
    "task.name=classify", "model.name=encoder", "model.dim=16", "model.layers=1", "model.ff=16", "model.heads=2",
    "model.dropout=0.0", "distill.enabled=false", "train.threads=1", "train.max_steps=10", "train.log_every=1",
    "train.batch_size=4", "train.optimizer=sgd", "train.lr=0.1", "train.checkpoint_every=4",
]  # fmt: skip
# Name: (fault, more words).
CASES = {
    "undisturbed": ("", []),
    "memory of one rank": ("oom@3:rank1:over1", []),
    "memory of both ranks": ("oom@3:over1", []),
    "no memory at all": ("oom@3:rank1:over0", []),
    "stop": ("nan-loss@5:rank1", []),
    "stop at a gradient": ("nan-gradient@5:rank0", []),
    "skip": ("nan-loss@5:rank1", ["train.nonfinite.policy=skip"]),
    "rollback": ("nan-gradient@6:rank1", ["train.nonfinite.policy=rollback"]),
    "divided skip": ("nan-gradient@5:rank0", ["train.nonfinite.policy=skip", "parallel.zero=3"]),
    "divided rollback": ("nan-loss@6:rank1", ["train.nonfinite.policy=rollback", "parallel.zero=2"]),
    "evaluation": ("", []),
}
# Name: (the rank that is told to end, where, more words).
TOLD = {
    "told in an evaluation": (0, "tally", ["train.eval_every=4"]),
    "told in an evaluation, divided": (1, "tally", ["train.eval_every=4", "parallel.zero=3"]),
    "told between micro-batches": (1, "losses", ["train.accumulation=4", "train.batch_size=1"]),
    "told in a measurement": (0, "measurement", ["train.precision=auto"]),
}


class Narrow(Classify):
    """A task whose evaluation needs too much memory on rank 0 alone."""

    def tally(self, logits, batch):
        if os.environ["RANK"] == "0" and len(logits) > 4:
            raise torch.OutOfMemoryError("injected")
        return super().tally(logits, batch)


class Told(Classify):
    """A task that has one rank told to end in its third forward pass, or in its first evaluation or measurement."""

    rank, where, passes = -1, "", 0

    def told(self, where: str) -> None:
        if self.rank == int(os.environ["RANK"]) and self.where == where:
            os.kill(os.getpid(), signal.SIGTERM)

    def losses(self, model, batch):
        self.passes += 1
        self.told("losses" if self.passes == 3 else "")
        if self.passes == 1 and self.where == "measurement":
            self.told("measurement")
            time.sleep(60.0)  # in which the rank that waits for this one would give up
        return super().losses(model, batch)

    def tally(self, logits, batch):
        self.told("tally")
        return super().tally(logits, batch)


def outcome(dataset: Dataset, words: list[str], kind: type[Classify]) -> dict:
    """What a run came to."""
    params = load(None, [*WORDS, *words])
    seed_all(params.train.seed)
    model = models.build(params.model, dataset.spec)
    digests = []

    def digest(*_) -> None:
        whole = [getattr(value, "full_tensor", lambda value=value: value)() for value in model.state_dict().values()]
        content = b"".join(value.detach().numpy().tobytes() for value in whole)
        digests.append(hashlib.sha256(content).hexdigest())

    try:
        fitted = fit(params, kind(params, dataset), model, on_step=digest)
    except MillraceError as error:
        return {"error": error.message, "digests": digests}
    rows = fitted.history
    return {
        "losses": [row["train_loss"] for row in rows if "train_loss" in row],
        "events": [row["event"] for row in rows if "event" in row],
        "digests": digests,
        "metrics": fitted.metrics,
    }


def main(place: Path) -> None:
    """Train each case."""
    rank = int(os.environ["RANK"])
    dataset = Dataset(place / "data")
    found = {}
    with process_group("auto", 30.0, torch.device("cpu")):
        for name, (fault, words) in CASES.items():
            os.environ[inject.VARIABLE] = fault
            found[name] = outcome(dataset, words, Narrow if name == "evaluation" else Classify)
        os.environ[inject.VARIABLE] = ""
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        for name, (told, where, words) in TOLD.items():
            found[name] = outcome(dataset, words, type("Task", (Told,), {"rank": told, "where": where}))
    (place / f"rank-{rank}.json").write_text(json.dumps(found))
