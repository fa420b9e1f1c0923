"""Pipeline parallel: the ranks of a pipeline hold consecutive blocks of a model and hand micro-batches on.

All ranks of a pipeline fetch the same batch, and cut it into the same micro-batches. So each knows the shape of whatever
it is sent, each makes masks and positions from the inputs by itself, and only the stream between the blocks travels.
Losses are sums over units: cut into parts of any sizes, they and their gradients add up to those of the batch.

torch has schedules of its own (`torch.distributed.pipelining`), which want micro-batches of one shape from the first to
the last, and import the compiler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import Parallel
from trainer.errors import ConfigError
from trainer.models.stack import Finish, Stack
from trainer.parallel.schedule import Work, num_parts, spans, table
from trainer.tasks.base import Batch, Task


def divide(model: nn.Module, family: str, parallel: Parallel, rank: int) -> list[tuple[int, int]]:
    """Take out of a model, in place, what other ranks of the pipeline hold; names of parameters stay as they are.

    Args:
        model: the whole model.
        family: its `model.name`.
        parallel: the section.
        rank: this rank's place in the pipeline.

    Returns:
        The spans of blocks of this rank's stages.

    Raises:
        ConfigError: the family is no stack of blocks, or has too few.
    """
    if not isinstance(model, Stack):
        raise ConfigError(
            f"parallel.pp: {parallel.pp}, but model.name={family} cannot be divided into stages: its layers are no stack of "
            "like blocks",
            "use parallel.pp=1 (parallel.zero divides any model), or model.name=decoder, encoder or vit",
        )
    total = len(model.blocks)
    mine = spans(parallel, total)[rank :: parallel.pp]
    kept = {index for first, end in mine for index in range(first, end)}
    for index in set(range(total)) - kept:
        setattr(model.blocks, str(index), None)
    needed = set(model.embed_names) if 0 in kept else set()
    if total - 1 in kept:
        needed |= set(model.head_names)
    for name in {*model.embed_names, *model.head_names} - needed:
        setattr(model, name, None)
    return mine


def copied(model: nn.Module, rank: int) -> list[str]:
    """Names of this rank's parameters that the first rank of the pipeline has too: tied embeddings, on the last rank."""
    if rank == 0 or not isinstance(model, Stack):
        return []
    both = set(model.embed_names) & set(model.head_names)
    return [name for name, _ in model.named_parameters() if name.split(".")[0] in both]


# Tensors that a rank has sent and the next one has not yet taken: they take memory.
AHEAD = 2
TALLY = "tally"


class _Kept(NamedTuple):
    """What a stage keeps of a micro-batch until its backward pass."""

    entered: Tensor | None
    left: Tensor


class Pipeline:
    """This rank's stages of a pipeline.

    Args:
        model: this rank's part, as `divide` left it (perhaps divided further).
        mine: its stages' spans of blocks.
        group: the ranks of the pipeline, in order.
        parallel: the section.
        context: what forward passes are made in, such as autocast.
    """

    def __init__(
        self,
        model: Stack,
        mine: list[tuple[int, int]],
        group: dist.ProcessGroup,
        parallel: Parallel,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.mine, self.group, self.context = model, mine, group, context
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.stages = len(mine) * self.ranks
        self.schedule, self.parts = parallel.pipeline.schedule, num_parts(parallel)
        # NCCL connects a group at its first call, to which all must come; neighbours alone would wait for the others.
        dist.all_reduce(torch.zeros(1, device=next(model.parameters()).device), group=group)

    def backward(
        self, task: Task, batch: Batch, scale: float, finish: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Forward and backward pass of a batch through all stages; gradients are added to the parameters'.

        Args:
            task: its losses.
            batch: on the device, the same on all ranks of the pipeline.
            scale: factor of the loss whose gradient is wanted.
            finish: called before this rank's last backward pass.

        Returns:
            The loss terms by name, float64 sums over units, not scaled, on the last rank; none on the others.
        """
        run = _Run(self, task, batch, self.schedule, scale, finish)
        run.go()
        return run.sums

    def tally(self, task: Task, batch: Batch) -> Tensor:
        """The task's tally of a batch on the last rank, on the CPU; an empty tensor on the others. Without gradients."""
        run = _Run(self, task, batch, "forward")
        with torch.no_grad():
            run.go()
        return run.sums[TALLY].cpu() if run.sums else torch.zeros(0, dtype=torch.float64)

    def sum_copies(self) -> None:
        """Sum the gradients of tied embeddings over the first and the last rank: both copies get the same bits."""
        pair = (0, self.ranks - 1)
        if self.rank not in pair:
            return
        other = pair[1] if self.rank == 0 else 0
        both = set(self.model.embed_names) & set(self.model.head_names)
        for name, parameter in self.model.named_parameters():
            if name.split(".")[0] in both and parameter.grad is not None:
                mine = _local(parameter.grad)
                theirs = torch.empty_like(mine)
                ops = [self.send(mine, other), self.receive(theirs, other)]
                for work in dist.batch_isend_irecv(ops):
                    work.wait()
                mine += theirs

    def send(self, tensor: Tensor, rank: int) -> dist.P2POp:
        """The sending of a tensor to a rank of the pipeline."""
        return dist.P2POp(dist.isend, tensor, group=self.group, group_peer=rank)

    def receive(self, tensor: Tensor, rank: int) -> dist.P2POp:
        """The receipt of a tensor from a rank of the pipeline."""
        return dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=rank)


class _Rest(Stack):
    """The last stage as if it were the model: the task gives it inputs, and it goes on from the stream that has come."""

    def __init__(self, model: Stack, entered: Tensor | None, span: tuple[int, int]) -> None:
        super().__init__()
        self.rest = (model, entered, span)  # in a tuple: no module of this one's

    def forward(self, inputs: Tensor, x: Any = None, span: Any = None, finish: Finish | None = None) -> Tensor:
        """Logits, or what `finish` makes of the last stream."""
        model, entered, own = self.rest
        found: Tensor = model(inputs, entered, own, finish)
        return found


class _Run:
    """One batch on its way through the stages.

    Attributes:
        sums: on the last rank, the loss terms (or the tally) so far by name; empty elsewhere.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        task: Task,
        batch: Batch,
        schedule: str,
        scale: float = 1.0,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self.pipeline, self.task, self.evaluates = pipeline, task, schedule == "forward"
        self.scale, self.finish = scale, finish
        self.left = len(pipeline.mine) * pipeline.parts  # backward passes to make
        self.last = pipeline.stages - 1
        rows = len(batch["inputs"])
        bounds = [rows * part // pipeline.parts for part in range(pipeline.parts + 1)]
        self.batches = [{name: value[i:j] for name, value in batch.items()} for i, j in pairwise(bounds)]
        self.slots = table(schedule, pipeline.ranks, pipeline.stages, pipeline.parts)
        self.sums: dict[str, Tensor] = {}
        self.kept: dict[Work, _Kept] = {}
        # What is sent to this rank for a pass, and what it sends; None where there is nothing to wait for.
        self.arriving: dict[Work, tuple[Tensor, Any]] = {}
        self.sending: deque[tuple[Tensor, Any]] = deque()

    def go(self) -> None:
        """Do this rank's passes, slot by slot."""
        rank = self.pipeline.rank
        for slot in self.slots:
            work = slot[rank]
            made = None
            if work:
                made = self._backward(work) if work.backward else self._forward(work)
            self._exchange(slot, made)
            self._settle(AHEAD)
        self._settle(0)

    def _forward(self, work: Work) -> Tensor | None:
        """Forward pass: the stream to send on; None after the last stage, whose loss is kept."""
        pipeline, batch = self.pipeline, self.batches[work.part]
        entered = self._take(work) if work.stage else None
        if entered is not None and not self.evaluates:
            entered.requires_grad_()
        span = pipeline.mine[work.stage // pipeline.ranks]
        with pipeline.context():
            if work.stage == self.last:
                left = self._judge(_Rest(pipeline.model, entered, span), batch)
            else:
                left = pipeline.model(batch["inputs"], entered, span)
        if not self.evaluates:
            self.kept[work] = _Kept(entered, left)
        return None if work.stage == self.last else left.detach()

    def _judge(self, rest: Stack, batch: Batch) -> Tensor:
        """The loss (or the tally) of a micro-batch, which is added to the sums."""
        if self.evaluates:
            terms = {TALLY: self.task.tally(self.task.forward(rest, batch).float(), batch)}
        else:
            terms = self.task.losses(rest, batch)
        for name, term in terms.items():
            part = term.detach().double()
            self.sums[name] = self.sums[name] + part if name in self.sums else part
        return torch.stack(list(terms.values())).sum()

    def _backward(self, work: Work) -> Tensor | None:
        """Backward pass: the gradient to send back; None before the first stage."""
        entered, left = self.kept.pop(Work(work.stage, work.part))
        gradient = None if work.stage == self.last else self._take(work).to(left.dtype)
        self.left -= 1
        if self.left == 0:
            self.finish()
        if left.requires_grad:  # a first stage whose parameters are all frozen has nothing to do
            (left * self.scale if gradient is None else left).backward(gradient)  # type: ignore[no-untyped-call]
        return None if entered is None else entered.grad

    def _take(self, work: Work) -> Tensor:
        """What was sent for a pass, once it is here."""
        tensor, transfer = self.arriving.pop(work)
        if transfer is not None:
            transfer.wait()
        return tensor

    def _exchange(self, slot: tuple[Work | None, ...], made: Tensor | None) -> None:
        """Start sending what this rank has made in a slot, and receiving what it is sent."""
        pipeline = self.pipeline
        ops: list[dist.P2POp] = []
        moved: list[tuple[Work | None, Tensor]] = []
        for rank, work in enumerate(slot):
            target = None if work is None else self._after(work)
            if target is None:
                continue
            where = target.stage % pipeline.ranks
            if where == pipeline.rank:
                inputs = self.batches[target.part]["inputs"]
                tensor = torch.empty(pipeline.model.stream(inputs), device=inputs.device)
                self.arriving[target] = tensor, None
                if tensor.numel():  # nothing is sent of an empty micro-batch: both ends know
                    ops.append(pipeline.receive(tensor, rank))
                    moved.append((target, tensor))
            elif rank == pipeline.rank and made is not None and made.numel():
                made = _local(made).float().contiguous()
                ops.append(pipeline.send(made, where))
                moved.append((None, made))
        works = dist.batch_isend_irecv(ops) if ops else []
        if len(works) < len(ops):
            works *= len(ops)  # NCCL has one for all of them
        for (target, tensor), transfer in zip(moved, works, strict=True):
            if target is None:
                self.sending.append((tensor, transfer))
            else:
                self.arriving[target] = tensor, transfer

    def _settle(self, most: int) -> None:
        """Wait until no more than so many tensors are on their way."""
        while len(self.sending) > most:
            self.sending.popleft()[1].wait()

    def _after(self, work: Work) -> Work | None:
        """The pass that a pass sends to, if it does."""
        stage = work.stage + (-1 if work.backward else 1)
        return Work(stage, work.part, work.backward) if 0 <= stage <= self.last else None


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found
