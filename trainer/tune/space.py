"""The search space of params.yaml as Optuna distributions and as a grid; Katib's form is made from the same section.

A dimension is a dotted key of `model` or `train` with its bounds or choices (`trainer.config.stages.Dimension`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from trainer.config.stages import Dimension, Tune
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Any]

# A grid larger than this is a mistake in the space: its list alone would fill the memory.
MAX_GRID = 100_000


def distributions(tune: Tune) -> dict[str, BaseDistribution]:
    """Dotted key -> Optuna distribution, in the order of the section."""
    return {key: distribution(dimension) for key, dimension in tune.space.items()}


def distribution(dimension: Dimension) -> BaseDistribution:
    """The Optuna distribution of one dimension; `high` is lowered to the last value that a step reaches."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.type == "categorical":
        return CategoricalDistribution(dimension.choices)
    low, high = _bounds(dimension)
    if dimension.type == "int":
        step = _int_step(dimension)
        last = int(low) + (int(high) - int(low)) // step * step
        return IntDistribution(int(low), last, log=dimension.log, step=step)
    if dimension.step is None:
        return FloatDistribution(low, high, log=dimension.log)
    return FloatDistribution(low, _stepped(dimension)[-1], step=dimension.step)


def grid_values(key: str, dimension: Dimension) -> list[Any]:
    """All values of one dimension.

    Raises:
        ConfigError: the dimension is continuous.
    """
    if dimension.type == "categorical":
        return list(dimension.choices)
    low, high = _bounds(dimension)
    if dimension.log or (dimension.type == "float" and dimension.step is None):
        raise ConfigError(
            f"tune.space.{key}: a grid needs a step, and this dimension is continuous",
            f"set tune.space.{key}.step, list its values as a categorical, or use another tune.sampler",
        )
    if dimension.type == "int":
        return list(range(int(low), int(high) + 1, _int_step(dimension)))
    return _stepped(dimension)


def grid_size(tune: Tune) -> int:
    """Number of points of the grid."""
    return math.prod(len(grid_values(key, dimension)) for key, dimension in tune.space.items())


def grid(tune: Tune) -> list[Values]:
    """All points of the grid, the last dimension running fastest.

    Raises:
        ConfigError: a dimension is continuous, or the grid has more than `MAX_GRID` points.
    """
    if grid_size(tune) > MAX_GRID:
        raise ConfigError(
            f"tune.space: the grid has {grid_size(tune)} points, more than {MAX_GRID}",
            "use larger steps, or tune.sampler=tpe",
        )
    axes = [grid_values(key, dimension) for key, dimension in tune.space.items()]
    return [dict(zip(tune.space, point, strict=True)) for point in itertools.product(*axes)]


def outside(tune: Tune, tree: Mapping[str, Any]) -> list[str]:
    """What the search will not try though it is configured: `train.lr=0.01 (the search: 0.02 to 0.05)`, by dimension."""
    found = []
    for key, dimension in tune.space.items():
        value = _value_at(tree, key)
        if _taken(dimension, value) is None:
            if dimension.type == "categorical":
                allowed = ", ".join(map(str, dimension.choices))
            else:
                allowed = f"{dimension.low:g} to {dimension.high:g}"
            found.append(f"{key}={value} (the search: {allowed})")
    return found


def configured(tune: Tune, tree: Mapping[str, Any]) -> Values | None:
    """The point that the configuration itself stands for; None if one of its values lies outside of the space.

    Args:
        tune: the section.
        tree: the resolved configuration as plain dicts.
    """
    values = {key: _taken(dimension, _value_at(tree, key)) for key, dimension in tune.space.items()}
    return None if None in values.values() else values


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _taken(dimension: Dimension, value: Any) -> Any:
    """A value as the dimension holds it; None if it lies outside."""
    if dimension.type == "categorical":
        same = (
            each for each in dimension.choices if each == value and isinstance(each, bool) == isinstance(value, bool)
        )
        return next(same, None)
    if not _contains(dimension, value):
        return None
    return int(value) if dimension.type == "int" else float(value)


def _contains(dimension: Dimension, value: Any) -> bool:
    """Whether a number is one of the values of an int or float dimension."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = _bounds(dimension)
    if not low <= value <= high or (dimension.type == "int" and value != int(value)):
        return False
    if dimension.type == "int":
        return (int(value) - int(low)) % _int_step(dimension) == 0
    return dimension.step is None or any(math.isclose(value, each) for each in _stepped(dimension))


def _bounds(dimension: Dimension) -> tuple[float, float]:
    assert dimension.low is not None
    assert dimension.high is not None
    return dimension.low, dimension.high


def _int_step(dimension: Dimension) -> int:
    step = dimension.step or 1
    if step != int(step):
        raise ConfigError(
            f"tune.space: step ({step}) of an int dimension must be a whole number", "for example step: 1"
        )
    return int(step)


def _stepped(dimension: Dimension) -> list[float]:
    """low, low + step, ... in decimal arithmetic: 0.1, 0.2, 0.3 and not 0.30000000000000004."""
    low, high, step = (Decimal(repr(value)) for value in (dimension.low, dimension.high, dimension.step))
    count = int((high - low) / step) + 1
    if count > MAX_GRID:
        raise ConfigError(f"tune.space: a step of {step} makes {count} values", "use a larger step")
    return [float(low + index * step) for index in range(count)]
