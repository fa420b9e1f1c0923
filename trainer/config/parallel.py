"""Section `parallel`: how a model and its batches are divided among processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.base import Section


class Pipeline(Section):
    """Schedule of the pipeline's stages; of use where `parallel.pp` is above 1."""

    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019) or interleaved 1F1B (Narayanan et al. 2021)."""
    microbatches: int = Field(default=0, ge=0)
    """Parts that a micro-batch is cut into; 0 takes twice `parallel.pp`."""
    stages: int = Field(default=2, ge=2)
    """Stages of each rank with `interleaved`; the other schedules have one."""


class Nccl(Section):
    """NCCL's settings; what the environment says counts before them."""

    socket_ifname: str = ""
    """Network interfaces (NCCL_SOCKET_IFNAME, and GLOO_SOCKET_IFNAME), such as `eth0` or `^docker,lo`."""
    ib_hca: str = ""
    """InfiniBand or RoCE cards (NCCL_IB_HCA), such as `mlx5`."""
    ib_disable: bool = False
    """Leave InfiniBand alone (NCCL_IB_DISABLE)."""
    p2p_disable: bool = False
    """No direct copies between the GPUs of a host (NCCL_P2P_DISABLE)."""
    algo: str = ""
    """Algorithms (NCCL_ALGO), such as `Ring` or `Tree,NVLS`."""
    debug: Literal["", "WARN", "INFO", "TRACE"] = ""
    """What NCCL prints (NCCL_DEBUG)."""


class Parallel(Section):
    """How the model and its batches are divided among processes; the product of the sizes is the number of processes."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """`auto` takes nccl on GPUs; on CPUs gloo, and shared memory for sums over up to 16 ranks of one Linux x86-64 machine."""
    timeout_s: float = Field(default=300.0, ge=1.0)
    """A collective that takes longer than this many seconds ends the job."""
    max_restarts: int = Field(default=0, ge=0)
    """Times torchrun restarts the local ranks from the newest checkpoint after one has died."""
    zero: Literal[0, 1, 2, 3] = 0
    """What ranks that see different batches divide (DeepSpeed's ZeRO stages): 0 nothing (DDP), 1 the optimizer's state, 2
    gradients too, 3 parameters too (FSDP)."""
    dp_replicate: int = Field(default=-1, ge=-1)
    """Groups of ranks that each hold the whole model (DDP, HSDP); -1 is the rest."""
    dp_shard: int = Field(default=1, ge=-1)
    """Ranks that share one copy of the model by `zero`; -1 is the rest."""
    tp: int = Field(default=1, ge=1)
    """Ranks that divide each matrix (tensor parallel)."""
    sequence_parallel: bool = True
    """With `tp`: also divide what lies between the matrices, along the sequence."""
    pp: int = Field(default=1, ge=1)
    """Ranks that divide the blocks, one after the other (pipeline parallel)."""
    pipeline: Pipeline = Pipeline()
    cp: int = Field(default=1, ge=1)
    """Ranks that divide each sequence (context parallel; GPUs only, language models only)."""
    ep: int = Field(default=1, ge=1)
    """Ranks, among those that see different batches, that divide the experts of a mixture; for models that have them."""
    nccl: Nccl = Nccl()
    preflight: Literal["auto", "off", "on"] = "auto"
    """Before training, see which ranks are there, how fast each pair is, and who is slow or dead: `auto` on several nodes."""
