"""Names that params.yaml may use for tasks, optimizers and schedules, and where each is implemented. Imports no torch.

To add one, write its file and enter one line here (models have parameters of their own: see trainer/config/model.py).
"""

from __future__ import annotations

import importlib
from typing import Any

TASKS: dict[str, str] = {
    "classify": "trainer.tasks.classify:Classify",
    "lm": "trainer.tasks.lm:LanguageModel",
    "image": "trainer.tasks.image:ImageClassify",
}

# Each is build(named_parameters, train: Train) -> torch.optim.Optimizer.
OPTIMIZERS: dict[str, str] = {
    "sgd": "trainer.train.optimizers:sgd",
    "adam": "trainer.train.optimizers:adam",
    "adamw": "trainer.train.optimizers:adamw",
    "adamw8bit": "trainer.train.adamw8bit:adamw8bit",
    "adafactor": "trainer.train.optimizers:adafactor",
    "lion": "trainer.train.lion:lion",
    "sophia": "trainer.train.sophia:sophia",
    "galore": "trainer.train.galore:galore",
    "muon": "trainer.train.muon:muon",
}

# Those that parallel.zero and parallel.tp can divide: they work element by element, or gather what they need whole.
SHARDABLE: frozenset[str] = frozenset({"sgd", "adam", "adamw", "lion", "sophia", "muon"})

# Each is scale(progress, train: Train) -> factor of the peak rate, for progress in 0..1 after the warm-up.
SCHEDULES: dict[str, str] = {
    "constant": "trainer.train.schedules:constant",
    "linear": "trainer.train.schedules:linear",
    "cosine": "trainer.train.schedules:cosine",
    "cosine_restarts": "trainer.train.schedules:cosine_restarts",
    "polynomial": "trainer.train.schedules:polynomial",
    "exponential": "trainer.train.schedules:exponential",
    "wsd": "trainer.train.schedules:wsd",
}


def load(target: str) -> Any:
    """Import `package.module:name` and return the object."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
