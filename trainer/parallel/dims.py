"""The one owner of the mesh: which axes there are, how long each is, and whether their product fits. Imports no torch.

| axis | ranks along it |
|---|---|
| pp | hold consecutive blocks of the model |
| dp_replicate | hold copies of the model and see different batches |
| dp_shard | share one copy by `parallel.zero` and see different batches |
| cp | divide each sequence |
| tp | divide each matrix |

From the slowest to the fastest: the ranks along tp are next to each other, on one host where they can be. Ranks along
dp_shard and cp together share what `parallel.zero` says: all of them hold the same blocks and sum their gradients.

Beside the axes, `ep` of the ranks that see different batches divide a mixture's experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config import Parallel
from trainer.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Dims:
    """The length of each axis. `zero` is 0 where there is nothing to share."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """Number of ranks, or groups of ranks, that see different batches."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharers(self) -> int:
        """Number of ranks that share one copy of the model, or of their part of it, by `zero`."""
        return self.dp_shard * self.cp

    def __str__(self) -> str:
        """Such as `pp2 x dp_shard2 (zero 3)`."""
        lengths = {**dict(zip(AXES, self.shape, strict=True)), "ep": self.ep}
        parts = [f"{axis}{length}" for axis, length in lengths.items() if length > 1]
        return (" x ".join(parts) or "1 rank") + (f" (zero {self.zero})" if self.zero else "")


def resolve(parallel: Parallel, num_ranks: int) -> Dims:
    """The lengths that `parallel` means for so many ranks; -1 is the rest.

    Where `zero` is above 0 and `dp_shard` is 1, `dp_shard` is the rest: there would be nothing to share otherwise.

    Raises:
        ConfigError: the product is not the number of ranks, or cannot be.
    """
    for key in ("dp_replicate", "dp_shard"):
        if getattr(parallel, key) == 0:
            raise ConfigError(f"parallel.{key}: 0 ranks", f"use parallel.{key}=1, or -1 for the rest")
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if parallel.zero and shard == 1:
        shard = -1
    if replicate == shard == -1:
        # Both cannot be the rest: the one that is asked for by name, or by `zero`, is.
        replicate, shard = (1, -1) if parallel.zero else (-1, 1)
    given = {"dp_replicate": replicate, "dp_shard": shard, "tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp}
    fixed = math.prod(length for length in given.values() if length > 0)
    rest = [axis for axis, length in given.items() if length < 0]
    if num_ranks % fixed or (not rest and num_ranks != fixed):
        raise _misfit(given, fixed, num_ranks, bool(rest))
    for axis in rest:
        given[axis] = num_ranks // fixed
    if given["dp_shard"] > 1 and not parallel.zero:
        raise ConfigError(
            f"parallel.dp_shard: {given['dp_shard']} ranks share a model, but parallel.zero is 0: they share nothing",
            "use parallel.zero=3 (or 1, 2), or parallel.dp_shard=1",
        )
    found = Dims(**given, ep=parallel.ep, zero=parallel.zero if given["dp_shard"] * given["cp"] > 1 else 0)
    if found.data % found.ep:
        raise ConfigError(
            f"parallel.ep: {found.ep} ranks divide the experts, among {found.data} that see different batches",
            f"use a parallel.ep that divides {found.data}",
        )
    return found


def _misfit(given: dict[str, int], fixed: int, num_ranks: int, rest: bool) -> ConfigError:
    """The error for a product that does not fit, with the smallest changes that do."""
    named = {axis: length for axis, length in given.items() if length > 1}
    product = " x ".join(f"{axis} {length}" for axis, length in named.items())
    if len(named) != 1:
        product = f"{product} = {fixed}" if named else "every axis is 1, which"
    how = "does not divide" if rest else "is not"
    changes = []
    for axis, length in named.items():
        for smaller in range(length - 1, 0, -1):
            if num_ranks % (fixed // length * smaller) == 0 and (rest or fixed // length * smaller == num_ranks):
                changes.append((smaller / length, f"parallel.{axis}={smaller}"))
                break
    more = math.ceil(num_ranks / fixed) * fixed if rest else fixed
    fixes = [f"{more} rank{'s' * (more > 1)} (train.processes={more} on one node)"]
    if changes:
        fixes.append(max(changes)[1])
    if not rest:
        fixes.append("parallel.dp_replicate=-1 where the rest is to see other batches")
    return ConfigError(f"parallel: {product} {how} the number of ranks, {num_ranks}", "use " + ", or ".join(fixes))


def check_axes(dims: Dims, device: str, has_experts: bool) -> None:
    """Refuse what no model can be divided by here.

    Args:
        dims: the axes.
        device: cpu or cuda.
        has_experts: whether the model has a mixture of experts (`trainer.models.experts`).

    Raises:
        ConfigError: cp or ep is above 1 and cannot be.
    """
    if dims.cp > 1 and device == "cpu":
        raise ConfigError(
            f"parallel.cp: {dims.cp}, but context parallel is for GPUs: ranks on CPUs share one memory and its processors, so "
            "dividing a sequence among them frees nothing",
            "use parallel.cp=1; parallel.tp with parallel.sequence_parallel divides the work, train.recompute frees memory",
        )
    if dims.ep > 1 and not has_experts:
        raise ConfigError(
            f"parallel.ep: {dims.ep}, but the model has no experts to divide", "use parallel.ep=1 with this model"
        )
    others = [f"parallel.{axis}=1" for axis in ("pp", "cp", "tp") if getattr(dims, axis) > 1]
    if dims.ep > 1 and others:
        raise ConfigError(
            f"parallel.ep: {dims.ep}, but experts are divided among ranks that see different batches, and only where nothing "
            "but parallel.zero divides the rest",
            f"use parallel.ep=1, or {' '.join(others)}",
        )
