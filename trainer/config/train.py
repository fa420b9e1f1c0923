"""Section `train`: how a model is optimised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer import plugins
from trainer.config.base import Section
from trainer.config.names import one_of
from trainer.config.train_parts import (
    Beta,
    EarlyStopping,
    GaLore,
    Group,
    Growth,
    Instability,
    NonFinite,
    Phase,
    Recompute,
    Sophia,
    Trace,
    check_phases,
)  # fmt: skip


class Train(Section):
    """The training loop: optimizer, schedule, precision, evaluation and checkpoints."""

    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order of the data and dropout."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the train split."""
    min_steps: int = Field(default=0, ge=0)
    """Make more epochs where the data is so small that they have fewer optimizer steps than this (of one process)."""
    max_steps: int = Field(default=0, ge=0)
    """Stop after this many optimizer steps; 0 goes by epochs."""
    batch_size: int = Field(default=64, ge=1)
    """Examples in one micro-batch of one process."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step; the gradient is exact whatever their sizes."""
    optimizer: Annotated[str, AfterValidator(one_of(plugins.OPTIMIZERS))] = "adamw"
    """One of sgd, adam, adamw, adamw8bit, adafactor, lion, sophia, galore, muon (Muon for matrices, AdamW for the rest)."""
    lr: float = Field(default=1e-3, gt=0.0, le=100.0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the first and second moment (Adam and AdamW, Lion, Sophia, GaLore)."""
    eps: float = Field(default=1e-8, gt=0.0)
    """What keeps a division by the second moment finite; the least curvature of Sophia."""
    momentum: Beta = 0.9
    """Momentum of SGD and Muon."""
    muon_lr: float = Field(default=0.02, gt=0.0)
    """Peak rate of the matrices when the optimizer is muon; `lr` is then the rate of AdamW for the rest."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay on matrices (biases, norms and gains have none)."""
    sophia: Sophia = Sophia()
    galore: GaLore = GaLore()
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Each block's rate is this times that of the block above it, embeddings' the lowest; 1 gives all the same."""
    groups: tuple[Group, ...] = ()
    """Rates and decay of parameters whose names match a pattern; the first that matches counts."""
    schedule: Annotated[str, AfterValidator(one_of(plugins.SCHEDULES))] = "cosine"
    """Shape of the rate after warm-up: constant, linear, cosine, cosine_restarts, polynomial, exponential, wsd."""
    warmup: float = Field(default=0.0, ge=0.0)
    """Linear warm-up: a share of all steps if below 1, else a number of steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Lowest rate as a share of the peak."""
    restarts: int = Field(default=1, ge=1)
    """Number of cycles of cosine_restarts."""
    power: float = Field(default=1.0, gt=0.0)
    """Power of the polynomial schedule."""
    gamma: float = Field(default=0.01, gt=0.0, le=1.0)
    """Share of the peak that the exponential schedule reaches at the end."""
    decay: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the steps that the last phase of wsd (warm-up, stable, decay) takes."""
    phases: Annotated[tuple[Phase, ...], AfterValidator(check_phases)] = ()
    """Phases in place of `warmup` and `schedule`, one after the other: each leads from one factor of the peak to another."""
    clip: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 does not clip."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its frequency."""
    early_stopping: EarlyStopping = EarlyStopping()
    nonfinite: NonFinite = NonFinite()
    instability: Instability = Instability()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Automatic mixed precision; fp16 adds a gradient scaler. `auto` measures which is fastest here."""
    compile: Literal["auto"] | bool = False
    """Compile the model's blocks with torch.compile; `auto` does it where it pays back within the run."""
    recompute: Recompute = Recompute()
    offload: Literal["none", "optimizer"] = "none"
    """`optimizer` keeps the optimizer's state in the host's memory between steps (GPUs only)."""
    memory_gb: float = Field(default=0.0, ge=0.0)
    """Most memory of the device, in GB, that a step may take; 0 is all of it."""
    out_of_memory: Literal["adapt", "stop"] = "adapt"
    """`adapt` halves the micro-batch, then recomputes activations, then offloads, and keeps the step's batch."""
    growth: Growth = Growth()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    deterministic: bool = True
    """Use only deterministic kernels: the same seed gives the same bits."""
    threads: Literal["auto"] | Annotated[int, Field(ge=0)] = 0
    """CPU threads of each process; 0 shares the cores among the processes, `auto` measures. Part of what fixes the bits."""
    processes: int = Field(default=1, ge=1, le=1024)
    """Local ranks, started by torchrun."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate on the validation split after this many steps; 0 evaluates after each epoch."""
    log_every: int = Field(default=20, ge=1)
    """Log the loss after this many steps."""
    statistics_every: int = Field(default=0, ge=0)
    """Log norms of gradients, weights and updates by block after this many steps; 0 never does."""
    trace: Trace = Trace()
    checkpoint_every: int = Field(default=100, ge=1)
    """Save the training state after this many steps."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest complete checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint of the best score."""
    checkpoint_async: bool = True
    """Write checkpoints in the background, from a copy in the host's memory."""
    checkpoint_store: str = ""
    """URI under which complete checkpoints are copied, such as s3://bucket/run; empty copies none."""
