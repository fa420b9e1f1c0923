"""A plan under which ranks hold parts of the model: ZeRO and HSDP by FSDP2, tensor parallel by DTensor, any product.

What `parallel.zero` names, as FSDP2 does it (`fully_shard`; Rajbhandari et al. 2020 for the stages): between steps,
weights, gradients and the optimizer's state are always divided. The stages differ in what is whole during a step:

| zero | weights | gradients |
|---|---|---|
| 1 | gathered once, whole until the step's last backward pass | whole until then, then summed and divided |
| 2 | as 1 | summed and divided after each micro-batch |
| 3 | each block gathered when it runs, forward and backward | as 2 |
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.artifacts.dataset import Spec
from trainer.config import Params
from trainer.parallel import tensor
from trainer.parallel.context import Context
from trainer.parallel.dims import Dims
from trainer.parallel.experts import Shares
from trainer.parallel.group import Ranks, sum_tensors
from trainer.parallel.plan import Plan, local
from trainer.tasks.base import Batch, Task
from trainer.train import wrapped
from trainer.train.preempt import Preemption

# Axes of the mesh; ranks along cp are among those of dp_shard, next to each other.
MESH = ("pp", "dp_replicate", "dp_shard", "tp")


class Divided(Plan):
    """Ranks hold parts of the model."""

    lockstep = True

    def __init__(self, params: Params, dims: Dims, ranks: Ranks, device: torch.device) -> None:
        super().__init__(params, dims, ranks, device)
        self.mesh = make_mesh(dims, device, params.parallel.timeout_s)
        self.at = dict(zip(MESH, self.mesh.get_coordinate() or (), strict=True))
        self.stream = self.at["dp_replicate"] * dims.sharers + self.at["dp_shard"]
        self.rank, self.size = self.stream // dims.cp, dims.data
        self.counts = self.at["tp"] == 0 and self.at["pp"] == 0
        self.data_group = self.mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        limit(self.data_group, params.parallel.timeout_s)
        self.context = Context(self.mesh, dims.cp, params.parallel.timeout_s) if dims.cp > 1 else None
        self.shares = Shares(dims, ranks.rank, params.parallel.timeout_s) if dims.ep > 1 else None
        # Replicated parameters of which each rank along tp sees a part only: their gradients are summed along tp.
        self.partial: list[str] = []
        # Parameters that another stage has too, and names of those that only other ranks have.
        self.copies: set[str] = set()
        self.elsewhere: set[str] = set()
        self.spans: list[tuple[int, int]] | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.skeleton = nn.Module()

    # -- the model --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, spec: Spec) -> nn.Module:
        """Divide the model on the meta device, then give each rank its part of rank 0's weights."""
        first = self.ranks.rank == 0
        values = {name: value.detach() for name, value in _named(model)} if first else {}
        model.to("meta").train()
        self.skeleton = copy.deepcopy(model)
        self.take(model)
        if self.context:
            self.context.divide(model, self.params.model.name, spec)
        if self.shares:
            self.shares.divide(model)
        if self.dims.tp > 1:
            self.partial = tensor.divide(model, self.mesh["tp"], self.params, spec, self.spans)
        wrapped.apply(model, self.params.train)
        if self.dims.zero:
            self._shard(model)
        model.to_empty(device=self.device)
        mine = dict(_named(model))
        for name, value in _named(self.skeleton):
            whole = (
                values[name].to(self.device)
                if first
                else torch.empty(value.shape, dtype=value.dtype, device=self.device)
            )
            dist.broadcast(whole.contiguous(), 0)
            if name in mine:
                with torch.no_grad():
                    local(mine[name]).copy_(part_of(whole, mine[name]))
        self.parameters = dict(model.named_parameters())
        if self.shares:
            self.shares.held = self.shares.parameters(model)
        self.elsewhere = {name for name, _ in _named(self.skeleton)} - set(mine)
        if self.elsewhere:
            self.names = tuple(name for name, _ in self.skeleton.named_parameters())
        return model

    def take(self, model: nn.Module) -> None:
        """Leave out of a model what other ranks have of its blocks: nothing."""

    def _shard(self, model: nn.Module) -> None:
        """FSDP2 on each block, then on the rest."""
        axes = ("dp_replicate", "dp_shard") if self.dims.dp_replicate > 1 else ("dp_shard",)
        mesh, reshard = self.mesh[axes], self.dims.zero == 3
        if self.dims.tp > 1:
            _leave_out_warnings()
        ignored = self.shares.parameters(model) if self.shares else None
        for block in getattr(model, "blocks", ()):
            if block is not None:
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Losses are sums that are divided by the units of all ranks: gradients are summed, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def whole(self, model: nn.Module) -> nn.Module:
        """The trained model in one piece on the CPU of rank 0; elsewhere its shape, on the meta device."""
        values = self.values(model)
        if self.shares:
            self.shares.collect(values, self.skeleton, self.device)
        if self.ranks.rank == 0:
            self.skeleton.load_state_dict(values, assign=True)
        return self.skeleton

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The undivided weights and buffers of this rank's model, on the CPU."""
        values = {}
        for name, value in model.state_dict().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            values[name] = full.detach().cpu()
        return values

    def like(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """A DTensor divided as the parameter is that the name contains, for itself and what has its shape.

        None for what belongs to parameters that only other ranks have.
        """
        parts = name.split("/")
        if self.elsewhere.intersection(parts):
            return None
        parameter = next((self.parameters[part] for part in parts if part in self.parameters), None)
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    # -- a step -----------------------------------------------------------------------------------------------------

    def until(self, examples: int, batch_size: int) -> int:
        """Beyond the last example, where the last round of micro-batches does not reach all ranks."""
        together = self.size * batch_size
        return -(-examples // together) * together

    def part(self, batch: Batch) -> Batch:
        """With context parallel, this rank's places of each sequence."""
        return self.context.part(batch) if self.context else batch

    def backward(self, task: Task, model: nn.Module, batch: Batch, scale: float, *, last: bool) -> dict[str, Tensor]:
        """Forward and backward pass; FSDP sums gradients as `parallel.zero` says."""
        self.synchronise(model, last)
        return super().backward(task, model, batch, scale, last=last)

    def synchronise(self, model: nn.Module, last: bool) -> None:
        """Tell FSDP, if there is, whether the next backward pass is the last of a step."""
        if isinstance(model, FSDPModule):
            model.set_is_last_backward(last)
            model.set_requires_gradient_sync(last or self.dims.zero > 1)
            model.set_reshard_after_backward(last or self.dims.zero == 3)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """What FSDP has not summed: over the ranks that see other batches or places, over tp where each sees a part."""
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif isinstance(parameter.grad, DTensor) and isinstance(parameter, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        partial = {id(self.parameters[name]) for name in self.partial}
        sums = [local(p.grad) for p in parameters if id(p) in partial and p.grad is not None]
        sum_tensors(sums, self.mesh["tp"].get_group())
        experts = self.shares.held if self.shares else set()
        if self.shares:
            sum_tensors([p.grad for p in parameters if p in experts and p.grad is not None], self.shares.copies)
        if not self.dims.zero and self.dims.data * self.dims.cp > 1:
            rest = [local(p.grad) for p in parameters if p not in experts and p.grad is not None]
            sum_tensors(rest, self.data_group)

    def norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """From each rank the squares of what it holds, of copies one: summed over all ranks."""
        twice = {id(self.parameters[name]) for name in self.copies}
        mine = [local(p.grad) for p in parameters if p.grad is not None and self._speaks_for(p) and id(p) not in twice]
        mine = [gradient for gradient in mine if gradient.numel()]
        square = torch.zeros((), dtype=torch.float64)
        if mine:
            square = torch.stack(torch._foreach_norm(mine)).double().square().sum().cpu()
        return float(self.ranks.sum(square).sqrt())

    def owns(self, name: str, parameter: Tensor) -> bool:
        """Whether this rank is the first of those that hold the same part of a parameter."""
        return name not in self.copies and self._speaks_for(parameter)

    def _speaks_for(self, parameter: Tensor) -> bool:
        """Whether of the ranks that hold the same part of a parameter this one is the first."""
        if self.shares and parameter in self.shares.held:
            return self.shares.first
        divided = {"pp"}
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names or ()
            divided |= {axis for axis, how in zip(names, parameter.placements, strict=True) if not how.is_replicate()}
        return all(at == 0 for axis, at in self.at.items() if axis not in divided)

    def same_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of the first that sees other batches."""
        for buffer in model.buffers():
            dist.broadcast(buffer, group=self.data_group, group_src=0)

    def total(self, task: Task, model: nn.Module, batch_size: int, preemption: Preemption) -> Tensor:
        """As of the plan that does not divide, in lockstep: when SIGTERM came to one rank, it ends on all.

        Raises:
            Interrupted: SIGTERM came to a rank.
        """

        def poll() -> None:
            preemption.asked = bool(self.ranks.sum(torch.tensor(float(preemption.asked))))
            preemption.poll()

        try:
            tally = task.total(
                model,
                "val",
                batch_size,
                shard=(self.rank, self.size),
                poll=poll,
                lockstep=True,
                tally=lambda batch: self.tally(task, model, self.part(batch)),
            )
        finally:
            # The weights that the evaluation has gathered are divided again.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return tally if self.counts else torch.zeros(0, dtype=torch.float64)


def make_mesh(dims: Dims, device: torch.device, timeout_s: float) -> DeviceMesh:
    """All ranks along the axes of `MESH`; collectives along an axis give up as those of all ranks do."""
    shape = (dims.pp, dims.dp_replicate, dims.sharers, dims.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=MESH)
    for axis, length in zip(MESH, shape, strict=True):
        if length > 1:
            limit(mesh.get_group(axis), timeout_s)
    return mesh


def limit(group: Any, timeout_s: float) -> None:
    """Set the time after which a group's collectives give up; torch makes groups of a mesh with half an hour."""
    if group is not None:
        # Public as `torch.distributed.set_timeout` since 2.13 or so; the private name is there before.
        public = getattr(dist, "set_timeout", None)
        (public or dist.distributed_c10d._set_pg_timeout)(timedelta(seconds=timeout_s), group)


def part_of(whole: Tensor, value: Tensor) -> Tensor:
    """What a rank holds of a whole tensor, if it is divided as `value` is."""
    if not isinstance(value, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, value.device_mesh, value.placements)
    return whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _leave_out_warnings() -> None:
    """Keep from users what torch warns of where zero and tp divide the same weights."""
    # What a block returns may be a view. It is read only: families with a plan for tp are our own.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    # Such weights are gathered along one axis after the other. Nothing is reduced there, so no rank gets other values.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
