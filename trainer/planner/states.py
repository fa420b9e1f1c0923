"""Bytes that each optimizer keeps and needs for a parameter, checked against the optimizers themselves by a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from trainer.config import Train
from trainer.planner.shape import Matrix, Shape


@dataclass(frozen=True)
class Optimizer:
    """What of section `train` bears on an optimizer's memory."""

    name: str = "adamw"
    momentum: bool = True
    decay: bool = False
    rank: int = 128


def optimizer_of(train: Train) -> Optimizer:
    """The optimizer that section `train` means."""
    return Optimizer(train.optimizer, train.momentum > 0, train.weight_decay > 0, train.galore.rank)


# Matrices that Muon and GaLore leave to AdamW, see `trainer.train.muon.is_matrix`.
ENDS = ("embedding", "bigrams", "output")


def _adamw(given: Optimizer, name: str, shape: Matrix) -> float:
    return 8.0 * math.prod(shape) + 4.0


def _adamw8bit(given: Optimizer, name: str, shape: Matrix) -> float:
    values = math.prod(shape)
    small = values < 4096 or values % 256
    return _adamw(given, name, shape) if small else 2.0 * (values + 4.0 * values / 256) + 4.0


def _adafactor(given: Optimizer, name: str, shape: Matrix) -> float:
    return 4.0 * (sum(shape) if len(shape) > 1 else math.prod(shape)) + 4.0


def _galore(given: Optimizer, name: str, shape: Matrix) -> float:
    rank = given.rank
    if len(shape) < 2 or name in ENDS or min(shape) <= rank:
        return _adamw(given, name, shape)
    return 4.0 * rank * (min(shape) + 2 * max(shape)) + 4.0


def _muon(given: Optimizer, name: str, shape: Matrix) -> float:
    return 4.0 * math.prod(shape) if len(shape) > 1 and name not in ENDS else _adamw(given, name, shape)


# Optimizer -> bytes of state of a parameter of float32.
STATES: dict[str, Callable[[Optimizer, str, Matrix], float]] = {
    "sgd": lambda given, name, shape: 4.0 * math.prod(shape) if given.momentum else 0.0,
    "adam": _adamw,
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": lambda given, name, shape: 4.0 * math.prod(shape),
    "sophia": lambda given, name, shape: 8.0 * math.prod(shape),
    "galore": _galore,
    "muon": _muon,
}


@cache
def state_bytes(shape: Shape, given: Optimizer) -> tuple[float, float]:
    """Bytes of state of one block, and of what comes before and after the blocks."""
    rule = STATES[given.name]
    return (
        sum(rule(given, name, each) for name, each in shape.block().items()),
        sum(rule(given, name, each) for name, each in shape.ends().items()),
    )


@cache
def step_bytes(shape: Shape, given: Optimizer) -> tuple[float, float]:
    """Bytes that a step of the optimizer needs for a moment: those that are divided as the model is, those that are not."""
    whole = 4.0 * shape.num_parameters
    largest = max(math.prod(each) for _, each, _ in shape.parameters())
    if given.name == "muon":
        # The momenta looked ahead; matrices of one shape whole and stacked, in the iteration's several copies.
        matrices = sum(math.prod(each) for each in shape.block().values() if len(each) > 1) * shape.layers
        return 4.0 * matrices, 11.2 * 2 * shape.ff * shape.dim * shape.layers
    shares = {
        "sgd": float(given.decay),
        "adafactor": 1.0,
        "lion": 1.0,
        "sophia": 2.0,
    }  # adam and adamw: fused, in place
    alone = {"adamw8bit": 70.0, "galore": 12.0}  # a matrix at a time
    return shares.get(given.name, 0.0) * whole, alone.get(given.name, 0.0) * largest
