"""How a model and its batches are divided among the ranks, as one object: the loop calls the same methods whatever it is.

`make` gives a `Plan` (every rank holds the whole model: one process, or DDP) or a `trainer.parallel.divided.Divided`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.artifacts.dataset import Spec
from trainer.config import Params
from trainer.models.experts import Experts
from trainer.parallel.dims import Dims, check_axes, resolve
from trainer.parallel.group import Ranks
from trainer.tasks.base import Batch, Task
from trainer.train import wrapped
from trainer.train.device import autocast
from trainer.train.preempt import Preemption


class Plan:
    """Every rank holds the whole model and sees batches of its own.

    Attributes:
        dims: the lengths of the axes.
        rank: this rank's place among those that see different batches; ranks that share a batch have the same.
        size: number of those.
        stream: number of this rank's random numbers; ranks that make the same of the same batch have the same.
        counts: whether this rank's units, losses and tallies count in sums over all ranks: of the ranks that see the
            same part of a batch, one does.
        lockstep: whether a forward pass needs other ranks: then all make equally many.
        names: of all parameters of the whole model, where this rank has but some of them.
    """

    counts = True
    lockstep = False
    names: tuple[str, ...] = ()

    def __init__(self, params: Params, dims: Dims, ranks: Ranks, device: torch.device) -> None:
        self.params, self.dims, self.ranks, self.device = params, dims, ranks, device
        self.rank, self.size = ranks.rank, ranks.size
        self.stream = ranks.rank

    # -- the model --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, spec: Spec) -> nn.Module:
        """The model to train, on the device and divided: the weights of rank 0, whatever the others were built with.

        Order: tensor parallel, activation checkpointing, compilation of blocks, FSDP.

        Args:
            model: built, elsewhere than on rank 0 perhaps on the meta device.
            spec: the shape of the examples.

        Raises:
            ConfigError: the model cannot be divided so.
        """
        if any(value.is_meta for value in [*model.parameters(), *model.buffers()]):
            model.to_empty(device=self.device)
        model.to(self.device).train()
        self.ranks.same_parameters(model)
        wrapped.apply(model, self.params.train)
        return model

    def whole(self, model: nn.Module) -> nn.Module:
        """The trained model in one piece on the CPU. Under a plan that divides it: on rank 0, elsewhere without values."""
        wrapped.undo(model)
        return model.to("cpu")

    def like(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The empty tensor into which a checkpoint's tensor is read: of this rank's part, where it has but a part, or None.

        Args:
            name: the tensor's name in the checkpoint, such as `/optimizer/norm.weight/exp_avg`.
            size: shape of the whole.
            dtype: its type.
        """
        return torch.empty(size, dtype=dtype)

    # -- a step -----------------------------------------------------------------------------------------------------

    def until(self, examples: int, batch_size: int) -> int:
        """Where the examples of a step end, for ranks that take micro-batches in turn.

        In lockstep it is beyond the last example, so that each rank makes as many micro-batches, empty ones too.
        """
        return examples

    def part(self, batch: Batch) -> Batch:
        """What this rank works on of a batch that it may share with others; units and losses are those of the part."""
        return batch

    def backward(self, task: Task, model: nn.Module, batch: Batch, scale: float, *, last: bool) -> dict[str, Tensor]:
        """Forward and backward pass of a micro-batch: its loss terms by name, float64 sums over units, not scaled.

        Args:
            task: its losses.
            model: as `prepare` gave it, or compiled.
            batch: this rank's part, on the device.
            scale: factor of the loss whose gradient is added to the parameters' gradients.
            last: whether it is the step's last micro-batch on this rank.
        """
        with autocast(self.params.train, self.device):
            terms = task.losses(model, batch)
        total = torch.stack(list(terms.values())).sum()
        (total * scale).backward()  # type: ignore[no-untyped-call]
        return {name: term.detach().double() for name, term in terms.items()}

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Complete the gradients of a step: afterwards each is the sum over all ranks' micro-batches."""
        self.ranks.sum_gradients(parameters)

    def norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """The norm of all gradients together; the same bits on every rank."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def owns(self, name: str, parameter: Tensor) -> bool:
        """Whether this rank's part of a parameter counts in sums over all ranks: of ranks that hold the same, one's does."""
        return self.ranks.rank == 0

    def multiply(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply all gradients, in place."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def same_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers (running means and the like) of the first that has them."""
        self.ranks.same_buffers(model)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def total(self, task: Task, model: nn.Module, batch_size: int, preemption: Preemption) -> Tensor:
        """This rank's share of the tally of the validation split; empty where it does not count. SIGTERM ends it.

        Raises:
            Interrupted: SIGTERM came to this rank.
        """
        return task.total(model, "val", batch_size, shard=(self.rank, self.size), poll=preemption.poll)

    def tally(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """The task's tally of this rank's part of a batch; empty where this rank has no logits."""
        return task.tally(task.forward(model, batch).float(), batch).cpu()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; a tensor that is not divided, itself."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def make(params: Params, ranks: Ranks, device: torch.device, model: nn.Module) -> Plan:
    """The plan that section `parallel` means for these ranks.

    Raises:
        ConfigError: the axes do not fit the ranks, or the model cannot be divided so.
    """
    # A stage that does not start ranks (tuning, distillation) trains in one process, whatever `train.processes` is.
    alone = ranks.size == 1 and params.train.processes > 1
    dims = Dims() if alone else resolve(params.parallel, ranks.size)
    check_axes(dims, device.type, any(isinstance(module, Experts) for module in model.modules()))
    if dims.zero == 0 and dims.tp == dims.pp == dims.cp == dims.ep == 1:
        return Plan(params, dims, ranks, device)
    from trainer.parallel.divided import Divided  # FSDP and DTensor: heavy, imported when first needed

    if dims.pp == 1:
        return Divided(params, dims, ranks, device)
    from trainer.parallel.staged import Staged

    return Staged(params, dims, ranks, device)
