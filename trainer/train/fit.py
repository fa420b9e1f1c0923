"""Fit a model to a task: the function that every stage that trains calls."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trainer.artifacts.manifest import canonical
from trainer.config import Params
from trainer.monitor.sinks import LIVE, Guarded, LiveFile, Sink
from trainer.monitor.trace import Tracer
from trainer.monitor.watch import Watch
from trainer.parallel import group
from trainer.parallel import plan as plans
from trainer.stage import FREE
from trainer.tasks.base import Task
from trainer.train import probe
from trainer.train.checkpoint import Checkpoints
from trainer.train.device import machine
from trainer.train.export import files_of
from trainer.train.loop import Loop, OnEval, OnStep
from trainer.train.preempt import Preemption
from trainer.train.state import seed_all


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    Attributes:
        model: with the best weights by the task's metric, on the CPU, in evaluation mode. Under a plan that divides it:
            whole on rank 0, without values elsewhere.
        history: rows {"step", "epoch", "lr", "train_loss", "grad_norm"} and {"step", "val_…"}.
        metrics: of the validation split at `best_step`, names starting with `val_`.
        steps: optimizer steps done.
        best_step: the step of the weights.
        seconds: wall time, of this process only if it resumed.
        skipped: steps left out because something was not finite.
        rollbacks: times the run went back to good weights for that reason.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    steps: int
    best_step: int
    seconds: float
    skipped: int
    rollbacks: int


def fit(
    params: Params,
    task: Task,
    model: nn.Module,
    *,
    scratch: Path | None = None,
    on_eval: OnEval | None = None,
    on_step: OnStep | None = None,
    sinks: Sequence[Sink] = (),
    what: str = "train",
) -> Fitted:
    """Train `model` in place and give it back with its best weights.

    In a process group (see `trainer.parallel.group`) all ranks call this together and return the same. Section `parallel`
    says how the model is divided among them.

    Args:
        params: sections `train` and `parallel` say how; the seed also orders the data.
        task: batches, losses and metrics.
        model: freshly built or pre-trained; the values of rank 0 count, and elsewhere it may be on the meta device.
        scratch: folder for checkpoints; a run killed there goes on from the newest. None keeps none.
        on_eval: called after each evaluation with (step, metrics); what it raises ends the run.
        on_step: called after each optimizer step with (step, steps in all, model).
        sinks: what gets the rows of the run besides the live file in `scratch`, on rank 0; they are closed at the end.
        what: the name that messages use.

    Raises:
        ConfigError: the model cannot be divided among these ranks as section `parallel` says.
        DivergedError: a loss or gradient was not finite.
        Preempted: SIGTERM arrived; a checkpoint was written.
        StorageError: a checkpoint could not be written.
    """
    start = time.monotonic()
    with machine(params.train) as device, Preemption() as preemption:
        ranks = group.current(device)
        folder = scratch / what if scratch else None
        # What fixes a run is what was asked for: `auto`, not what it comes to on this host.
        asked, params = params, probe.settle(params, task, model, ranks, device, preemption, folder, what)
        plan = plans.make(params, ranks, device, model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        live: list[Sink] = [Guarded({LIVE: LiveFile(folder / LIVE)})] if folder and ranks.rank == 0 else []
        # Trials and folds are many: a trace is of the stage's own run.
        tracer = Tracer(params, ranks.rank) if what == "train" else None
        with (
            checkpoints_of(asked, task, model, folder, plan) as checkpoints,
            Watch(task, model, params.train, device, ranks.size, [*live, *sinks], tracer) as watch,
        ):
            model = plan.prepare(model, task.spec)
            loop = Loop(params, task, model, plan, checkpoints, preemption, what, on_eval, on_step, watch)
            seed_all(params.train.seed, plan.stream)
            loop.resume()
            loop.run()
        if loop.best:
            model.load_state_dict(loop.best)
        model = plan.whole(model).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)  # `train.groups` may have frozen it for this run
    done = loop.progress
    return Fitted(
        model, done.history, done.best_metrics, done.step, done.best_step, time.monotonic() - start,
        done.skipped, done.rollbacks,
    )  # fmt: skip


def checkpoints_of(params: Params, task: Task, model: nn.Module, folder: Path | None, plan: plans.Plan) -> Checkpoints:
    """The checkpoints of a run, as section `train` says; only those of the stage `train` are copied to the store."""
    train = params.train
    return Checkpoints(
        folder,
        train.keep_checkpoints,
        plan.ranks,
        identity(params, task, model),
        keep_best=train.keep_best,
        asynchronous=train.checkpoint_async,
        files=files_of(params.model, task.dataset) if folder else {},
        store=train.checkpoint_store if folder and folder.name == "train" else "",
        device=plan.device,
        parts=plan.dims.pp > 1 or plan.dims.ep > 1,
    )


def identity(params: Params, task: Task, model: nn.Module) -> str:
    """A digest of what fixes a run: parameters (without `trainer.stage.FREE`), data and the shape of the model."""
    train = {key: value for key, value in params.train.model_dump(mode="json").items() if key not in FREE["train"]}
    shapes = {name: [str(value.dtype), list(value.shape)] for name, value in model.state_dict().items()}
    data = [task.name, task.dataset.manifest.digest]
    return hashlib.sha256(canonical([train, shapes, data])).hexdigest()
