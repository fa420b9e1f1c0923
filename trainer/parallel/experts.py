"""Expert parallel: ranks that see different batches divide a mixture's experts (Lepikhin et al. 2021, GShard).

Of `parallel.ep` ranks each has a share of every mixture's experts. Rows go to the rank of their expert and come back by
all-to-all, forward and backward; so an expert's gradient is over the rows of all of them, and has to be summed only over
the ranks that have the same experts. The rest of the model is as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.errors import ConfigError
from trainer.models.experts import Experts
from trainer.parallel.dims import Dims
from trainer.parallel.group import subgroup


class Shares:
    """Which experts this rank has.

    Args:
        dims: all ranks see different batches; `ep` in a row divide the experts.
        rank: this rank.
        timeout_s: after which a collective gives up.

    Attributes:
        group: the ranks that divide the experts with this one.
        copies: the ranks that have the same.
        first: whether this rank is the first of those.
        held: the parameters of this rank's experts, once the model is made.
    """

    def __init__(self, dims: Dims, rank: int, timeout_s: float) -> None:
        self.size, self.place, self.first = dims.ep, rank % dims.ep, rank < dims.ep
        rows = torch.arange(dims.data).view(-1, dims.ep)
        self.group = subgroup(rows.tolist(), timeout_s)
        self.copies = subgroup(rows.t().tolist(), timeout_s)
        self.held: set[nn.Parameter] = set()

    def divide(self, model: nn.Module) -> None:
        """Leave out of a model, in place, what other ranks have of its experts.

        Raises:
            ConfigError: the ranks do not divide the experts of a mixture, or experts keep statistics in buffers, which the
                ranks that see different batches would overwrite by those of another expert.
        """
        for name, experts in _mixtures(model):
            total = len(experts)
            if buffer := next((each for each, _ in experts.named_buffers()), ""):
                raise ConfigError(
                    f"parallel.ep: experts of {name} keep a buffer, {buffer}, which ranks would overwrite with another's",
                    "use experts without buffers (LayerNorm or RMSNorm for BatchNorm), or parallel.ep=1",
                )
            if total % self.size:
                raise ConfigError(
                    f"parallel.ep: {self.size} does not divide the {total} experts of {name}",
                    f"use a parallel.ep that divides {total}",
                )
            for index in range(total):
                if self._owner(index, total) != self.place:
                    setattr(experts, str(index), None)
            experts.exchange = partial(self._exchange, experts)

    def parameters(self, model: nn.Module) -> set[nn.Parameter]:
        """Those of a model's experts."""
        return {parameter for _, experts in _mixtures(model) for parameter in experts.parameters()}

    def collect(self, values: dict[str, Tensor], whole: nn.Module, device: torch.device) -> None:
        """Complete the values of a model, on the CPU, by those of other ranks' experts; all ranks call it, rank 0 gets them.

        Args:
            values: of this rank's model, by name.
            whole: the undivided model; of any values.
            device: this rank's.
        """
        if not self.first:
            return
        for name, experts in _mixtures(whole):
            for index, expert in enumerate(experts):
                for part, like in expert.state_dict().items():
                    key = f"{name}.{index}.{part}"
                    value = values[key] if key in values else torch.empty(like.shape, dtype=like.dtype)
                    value = value.to(device)
                    dist.broadcast(value, group=self.group, group_src=self._owner(index, len(experts)))
                    if self.place == 0:
                        values[key] = value.cpu()

    def _owner(self, index: int, total: int) -> int:
        return index // (total // self.size)

    def _exchange(self, experts: Experts, x: Tensor, counts: Tensor) -> Tensor:
        """Rows in the order of all experts -> to their experts' ranks, through these, and back."""
        sent = counts.view(self.size, -1)
        got = torch.empty_like(sent)  # rows that each rank sends to each expert here
        dist.all_to_all_single(got, sent.contiguous(), group=self.group)
        there, here = sent.sum(1).tolist(), got.sum(1).tolist()
        mine = _AllToAll.apply(x, here, there, self.group)
        # They come by rank; an expert takes those of all ranks.
        numbers = torch.arange(got.shape[1], device=x.device).repeat(self.size)
        order = torch.argsort(numbers.repeat_interleave(got.flatten()), stable=True)
        out = experts.run(mine[order], got.sum(0))[torch.argsort(order)]
        back: Tensor = _AllToAll.apply(out, there, here, self.group)
        return back


def _mixtures(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))


class _AllToAll(torch.autograd.Function):
    """Rows to each rank and from each rank; backward, the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, here: list[int], there: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes = here, there, group
        out = x.new_empty(sum(here), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), here, there, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        here, there, group = ctx.sizes
        (gradient,) = gradients
        out = gradient.new_empty(sum(there), *gradient.shape[1:])
        dist.all_to_all_single(out, gradient.contiguous(), there, here, group=group)
        return out, None, None, None
