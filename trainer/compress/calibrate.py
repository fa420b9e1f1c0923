"""Temperature scaling (Guo et al. 2017): one number that makes a classifier's probabilities mean what they say.

Label smoothing, dropout and distillation leave a model right more, or less, often than it claims. The logits are divided
by the temperature that fits the validation split best. It is folded into the last layer, so that the model costs and
predicts what it did before, whatever reads its file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from trainer.tasks.base import Task, evaluating

# Of the temperature itself; a model that wants more is not helped by it.
BOUNDS = (0.05, 20.0)
_BATCH = 256


def calibrate(task: Task, model: nn.Module) -> float:
    """Scale the logits of a classifier in place; returns the temperature that was fitted on the validation split.

    1.0 and no change for a language model, for a model whose last layer is no `nn.Linear` called `output`, and
    where there is no validation split.
    """
    last = getattr(model, "output", None)
    if task.spec.task == "lm" or not isinstance(last, nn.Linear) or not task.num_examples("val"):
        return 1.0
    found = fit(*_validation(task, model))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.div_(found)
    return found


def fit(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood, to four digits.

    Args:
        logits: (rows, labels).
        targets: (rows) int, the right label's number.
    """
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(targets)), targets]

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        top = scaled.max(axis=1, keepdims=True)
        total = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
        return float((total - own / math.exp(log_temperature)).mean())

    # Rounded, so that sums in another order give the same weights.
    return float(f"{math.exp(_least(loss, math.log(BOUNDS[0]), math.log(BOUNDS[1]))):.4g}")


def _validation(task: Task, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets of the validation split."""
    logits, targets = [], []
    with evaluating(model):
        for start in range(0, task.num_examples("val"), _BATCH):
            index = np.arange(start, min(start + _BATCH, task.num_examples("val")))
            batch = task.batch("val", index)
            logits.append(task.forward(model, batch).float().numpy())
            targets.append(batch["targets"].numpy())
    return np.concatenate(logits), np.concatenate(targets)


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is least, by golden-section search."""
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
    return (low + high) / 2
