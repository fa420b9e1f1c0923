"""A plan under which ranks hold consecutive blocks of the model: a pipeline, by itself or of the parts of other plans."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.artifacts.dataset import Spec
from trainer.config import Params
from trainer.models.stack import Stack
from trainer.parallel.dims import Dims
from trainer.parallel.divided import Divided
from trainer.parallel.group import Ranks
from trainer.parallel.pipeline import Pipeline, copied, divide
from trainer.tasks.base import Batch, Task
from trainer.train.device import autocast


class Staged(Divided):
    """Each rank of a pipeline has stages of the model; ranks that have the same are divided further as `Divided` does."""

    def __init__(self, params: Params, dims: Dims, ranks: Ranks, device: torch.device) -> None:
        super().__init__(params, dims, ranks, device)
        self.place = self.at["pp"]
        # The last stage has the losses.
        self.counts = self.at["tp"] == 0 and self.place == dims.pp - 1
        # Stages draw dropout of their own.
        self.stream += self.place * dims.data * dims.cp

    # -- the model --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, spec: Spec) -> nn.Module:
        """This rank's part of the model; its parameters have the names that they have in the whole."""
        part = super().prepare(model, spec)
        assert isinstance(part, Stack)
        self.copies = set(copied(part, self.place))
        context = partial(autocast, self.params.train, self.device)
        assert self.spans is not None
        self.pipeline = Pipeline(part, self.spans, self.mesh.get_group("pp"), self.params.parallel, context)
        return part

    def take(self, model: nn.Module) -> None:
        """Leave out what other stages have."""
        self.spans = divide(model, self.params.model.name, self.params.parallel, self.place)

    def whole(self, model: nn.Module) -> nn.Module:
        """The model in one piece on the CPU of rank 0, which gets the values of the other stages from their ranks."""
        values = self.values(model)
        if self.at["dp_replicate"] or self.at["dp_shard"] or self.at["tp"]:
            return self.skeleton
        pipeline = self.pipeline
        names: list[list[str]] = [[]] * pipeline.ranks
        dist.all_gather_object(names, [name for name in values if name not in self.copies], group=pipeline.group)
        sizes = self.skeleton.state_dict()
        for place in range(1, pipeline.ranks):
            for name in names[place]:
                if self.place == place:
                    dist.batch_isend_irecv([pipeline.send(values[name].to(self.device), 0)])[0].wait()
                elif self.place == 0:
                    value = torch.empty(sizes[name].shape, dtype=sizes[name].dtype, device=self.device)
                    dist.batch_isend_irecv([pipeline.receive(value, place)])[0].wait()
                    values[name] = value.cpu()
        if self.place == 0:
            self.skeleton.load_state_dict(values, assign=True)
        return self.skeleton

    # -- a step -----------------------------------------------------------------------------------------------------

    def backward(self, task: Task, model: nn.Module, batch: Batch, scale: float, *, last: bool) -> dict[str, Tensor]:
        """Forward and backward pass through all stages, of which the last has the loss terms."""
        self.synchronise(model, False)
        # Whatever FSDP puts off comes with the last of this rank's backward passes.
        return self.pipeline.backward(task, batch, scale, partial(self.synchronise, model, last))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """As `Divided`, and tied embeddings over both ends of the pipeline."""
        super().sum_gradients(parameters)
        self.pipeline.sum_copies()

    # -- evaluation -------------------------------------------------------------------------------------------------

    def tally(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """Of a batch on its way through all stages; empty but on the last."""
        return self.pipeline.tally(task, batch)
