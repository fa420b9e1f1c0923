"""What a training run must remember to go on as if it had never stopped, besides the tensors."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Progress:
    """Plain values of a run's state: they go into the checkpoint as JSON.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data done.
        offset: examples of the epoch that were used up, over all ranks: with the seed and the epoch it is the cursor.
        block: examples per step over all ranks; a run that goes on with other ranks keeps it.
        evaluated: the last step that was evaluated; -1 before the first.
        best_score: best score of the validation split so far.
        best_step: its step.
        best_metrics: all metrics of that evaluation.
        anchor: the score that early stopping compares with.
        stale: evaluations since the anchor moved.
        stopped: whether early stopping has ended the run.
        window_loss: sum of the losses of the steps since the last logged one.
        window_steps: number of those steps.
        scale: fp16 loss scale.
        scale_steps: steps since the scale last changed.
        skipped: steps left out because something was not finite.
        rollbacks: times the run went back to the last good weights.
        lr_scale: factor of the rate, from the rollbacks.
        window: loss, gradient norm and loss scale of the last steps, see `trainer.train.instability`.
        warned: the step at which instability was last told of.
        stable: steps since the batch has changed, see `trainer.train.growth`.
        order_block: `block` at the beginning of the epoch, by which its order was made.
        memory: what was learnt from a shortage, see `trainer.train.memory`: examples of a micro-batch and the like.
        history: rows as they stand in history.jsonl.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    block: int = 0
    evaluated: int = -1
    best_score: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    anchor: float | None = None
    stale: int = 0
    stopped: bool = False
    window_loss: float = 0.0
    window_steps: int = 0
    scale: float = 65536.0
    scale_steps: int = 0
    skipped: int = 0
    rollbacks: int = 0
    lr_scale: float = 1.0
    window: list[list[float]] = field(default_factory=list)
    warned: int = -(10**9)
    stable: int = 0
    order_block: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def history_lines(rows: list[dict[str, Any]]) -> str:
    """The history as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def seed_all(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch; each rank differently, because each drops out on examples of its own."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of this rank's generators as JSON values."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back into a state of `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(_decode(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())
