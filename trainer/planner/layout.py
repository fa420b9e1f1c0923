"""How a run is laid out: the mesh, the batch of a step, and what is traded for memory."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import Params
from trainer.planner.states import Optimizer, optimizer_of

ADAMW = Optimizer()
MIXED = ("bf16", "fp16", "auto")


@dataclass(frozen=True)
class Layout:
    """One way to run. `batch` is the micro-batch of ranks that share a copy of the model, in sequences.

    Attributes:
        dp_replicate: groups that each hold the whole model.
        dp_shard: ranks that share a copy by `zero`.
        tp: ranks that divide each matrix.
        pp: ranks that divide the blocks.
        zero: what `dp_shard` shares.
        batch: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        parts: parts that a pipeline cuts a micro-batch into.
        recompute: none, selective or blocks.
        every: with blocks, one block in so many.
        sequence_parallel: with tp, what lies between the matrices is divided too.
        schedule: of the pipeline.
        precision: of the products of matrices.
        optimizer: what keeps a state for each parameter.
        offload: whether the optimizer's state is kept in the host's memory.
        compiled: whether blocks are compiled.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    batch: int = 1
    accumulation: int = 1
    parts: int = 1
    recompute: str = "none"
    every: int = 1
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    precision: str = "bf16"
    optimizer: Optimizer = ADAMW
    offload: bool = False
    compiled: bool = False

    @property
    def gpus(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.tp * self.pp

    @property
    def copies(self) -> int:
        """Number of micro-batches that are worked on at the same time."""
        return self.dp_replicate * self.dp_shard

    @property
    def sequences(self) -> int:
        """Sequences of a step over all ranks."""
        return self.copies * self.batch * self.accumulation

    @property
    def mixed(self) -> bool:
        """Whether products of matrices take 16 bits."""
        return self.precision in MIXED

    @property
    def width(self) -> int:
        """Bytes of a number in the products of matrices."""
        return 2 if self.mixed else 4

    @property
    def sequences_at_once(self) -> float:
        """Sequences that pass through a block together: a micro-batch, or a part of it in a pipeline."""
        return self.batch / self.parts

    @property
    def in_flight(self) -> int:
        """Most parts whose activations the first stage of the pipeline keeps."""
        return self.parts if self.schedule == "gpipe" else min(self.parts, self.pp)

    def words(self) -> dict[str, object]:
        """The layout as keys of params.yaml."""
        found: dict[str, object] = {
            "parallel.zero": self.zero,
            "parallel.dp_replicate": self.dp_replicate,
            "parallel.dp_shard": self.dp_shard,
            "parallel.tp": self.tp,
            "parallel.pp": self.pp,
            "train.batch_size": self.batch,
            "train.accumulation": self.accumulation,
            "train.recompute.mode": self.recompute,
        }
        if self.pp > 1:
            found["parallel.pipeline.microbatches"] = self.parts
        if self.recompute == "blocks" and self.every > 1:
            found["train.recompute.every"] = self.every
        return found


def configured(params: Params, gpus: int) -> Layout:
    """The layout that params.yaml means for so many GPUs.

    Raises:
        ConfigError: the mesh does not fit the number.
    """
    from trainer.parallel.dims import resolve

    dims, train, parallel = resolve(params.parallel, gpus), params.train, params.parallel
    parts = (parallel.pipeline.microbatches or 2 * dims.pp) if dims.pp > 1 else 1
    return Layout(
        dims.dp_replicate, dims.dp_shard, dims.tp, dims.pp, dims.zero, train.batch_size, train.accumulation, parts,
        train.recompute.mode, train.recompute.every, parallel.sequence_parallel, parallel.pipeline.schedule,
        train.precision, optimizer_of(train), train.offload == "optimizer", bool(train.compile),
    )  # fmt: skip


def global_batch(params: Params) -> int:
    """Sequences of a step as params.yaml means it: for the ranks that it names itself, however many GPUs there will be."""
    ranks = max(params.train.processes, params.cluster.gpus_per_node) * params.cluster.job.nodes
    copies = max(1, ranks // (params.parallel.tp * params.parallel.pp))
    return params.train.batch_size * params.train.accumulation * copies
