"""Sections `train` and `parallel`: how a model is optimised, and on how many processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer import plugins
from trainer.config.base import Section
from trainer.config.names import one_of

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class EarlyStopping(Section):
    """Stop when the validation metric no longer improves."""

    patience: int = Field(default=0, ge=0)
    """Evaluations without an improvement before training stops; 0 never stops early."""
    threshold: float = Field(default=0.0, ge=0.0)
    """Smallest change that counts as an improvement."""


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
    """One of sgd, adam, adamw, muon (Muon for matrices, AdamW for the rest)."""
    lr: float = Field(default=1e-3, gt=0.0, le=100.0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Adam's epsilon."""
    momentum: Beta = 0.9
    """Momentum of SGD and Muon."""
    muon_lr: float = Field(default=0.02, gt=0.0)
    """Peak rate of the matrices when the optimizer is muon; `lr` is then the rate of AdamW for the rest."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay on matrices (biases, norms and gains have none)."""
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
    clip: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 does not clip."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its frequency."""
    early_stopping: EarlyStopping = EarlyStopping()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Automatic mixed precision; fp16 adds a gradient scaler."""
    compile: bool = False
    """Compile the model with torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    deterministic: bool = True
    """Use only deterministic kernels: the same seed gives the same bits."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of each process; 0 shares the cores among the processes. Part of what fixes the bits."""
    processes: int = Field(default=1, ge=1, le=1024)
    """Local ranks, started by torchrun."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate on the validation split after this many steps; 0 evaluates after each epoch."""
    log_every: int = Field(default=20, ge=1)
    """Log the loss after this many steps."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Save the training state after this many steps."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Complete checkpoints to keep."""


class Parallel(Section):
    """The process group."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """`auto` takes nccl on GPUs and gloo on CPUs."""
    timeout_s: float = Field(default=300.0, ge=1.0)
    """A collective that takes longer than this many seconds ends the job."""
    max_restarts: int = Field(default=0, ge=0)
    """Times torchrun restarts the local ranks from the newest checkpoint after one has died."""
