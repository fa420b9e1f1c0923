"""The one training loop: CPU, GPU, torchrun and several nodes, whatever the task.

Order of a step: fetch all micro-batches -> count units over all ranks -> forward and backward, each loss divided by
that count -> sum gradients over the ranks -> finite check -> clip -> rate -> step -> hooks. Accumulation is exact:
8 micro-batches of 1 give the gradient of 1 of 8, whatever their lengths, and so do 2 ranks of 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from trainer import log
from trainer.config import Params
from trainer.errors import Preempted
from trainer.monitor.watch import Watch
from trainer.parallel.plan import Plan
from trainer.tasks.base import Batch, Task, to_device
from trainer.train import growth, inject, instability, optimizers, schedules
from trainer.train.checkpoint import Checkpoints
from trainer.train.cut import Cut
from trainer.train.guard import Guard
from trainer.train.memory import Again, Memory
from trainer.train.named_state import named_state, set_named_state
from trainer.train.preempt import Interrupted, Preemption
from trainer.train.sophia import Sampled, Sophia
from trainer.train.state import Progress, rng_state, set_rng_state

# fp16: the loss scale doubles after this many good steps, and halves on an overflow (Micikevicius et al. 2018).
GROW_EVERY = 2000
SMALLEST_SCALE = 2.0**-14

OnEval = Callable[[int, dict[str, float]], None]
OnStep = Callable[[int, int, nn.Module], None]


class Loop:
    """A run: its model, optimizer, progress and hooks. `run` goes from wherever the state is to the end."""

    def __init__(
        self,
        params: Params,
        task: Task,
        model: nn.Module,
        plan: Plan,
        checkpoints: Checkpoints,
        preemption: Preemption,
        what: str,
        on_eval: OnEval | None,
        on_step: OnStep | None,
        watch: Watch,
    ) -> None:
        self.train = params.train
        self.model, self.plan, self.ranks, self.device = model, plan, plan.ranks, plan.device
        self.task = inject.faulty(task, self.ranks.rank, lambda: self.progress.step + 1)
        self.checkpoints, self.preemption, self.watch = checkpoints, preemption, watch
        self.what, self.on_eval, self.on_step = what, on_eval, on_step
        self.optimizer = optimizers.build(model, self.train, plan.names)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.progress = Progress()
        self.guard = Guard(self.train, model, self.optimizer, self.ranks, what)
        self.memory = Memory(self.train, task, model, self.optimizer, plan, checkpoints.folder, what)
        self.cut = Cut(self.train, self.optimizer, plan, self.memory, preemption, what)
        self.best: dict[str, Tensor] = {}
        block = self.train.batch_size * self.train.accumulation * plan.size
        self._set_block(growth.first_block(self.train, block))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        # A trial is a part of a search, whose own progress is counted in trials.
        self._shown = log.Progress("step" if what == "trial" else what, self.total)

    def _set_block(self, block: int) -> None:
        """Fix the examples of a step over all ranks, and with them the number of steps."""
        self.block = block
        examples, alone = self.task.num_examples("train"), self.train.batch_size * self.train.accumulation
        # As many as one process would make: more of them must not mean more epochs.
        self.epochs = max(self.train.epochs, math.ceil(self.train.min_steps / max(math.ceil(examples / alone), 1)))
        self.total = self.train.max_steps or self.epochs * math.ceil(examples / block)

    def _resize(self, block: int) -> None:
        """Go on with another number of examples in a step."""
        self._set_block(block)
        examples = self.task.num_examples("train")
        self.total = growth.total_steps(self.progress, self.train, examples, self.epochs, self.total, block)
        self._shown.total = self.total

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, from the state that `resume` has set or from the beginning."""
        if self.epochs > self.train.epochs and not self.train.max_steps:
            rows, least = self.task.num_examples("train"), self.train.min_steps
            why = f"{rows:,} rows are few, and train.min_steps is {least}"
            log.say(f"{self.what}: {self.epochs} epochs instead of {self.train.epochs}: {why}")
        self.memory.recall(self.progress)
        with self._shown:
            while True:
                if self._evaluation_due():
                    self._evaluate()
                if self.progress.step >= self.total or self.progress.stopped:
                    break
                self._checkpoint()
                try:
                    with self.watch.traced(self.progress.step + 1):
                        self._step()
                except Again:
                    continue
                if self.on_step:
                    self.on_step(self.progress.step, self.total, self.model)
            self.guard.at_end(self.progress)
            if self.checkpoints.due_at_end():
                self.save(durable=True)
            self.checkpoints.settle()

    def _step(self) -> None:
        """One optimizer step."""
        now = self.progress
        now.block = self.block
        self.guard.begin(now)
        with self.watch.part("data"):
            batches, used = self._fetch()
        mine = [
            sum(self.task.units(batch) for batch, real in batches if real and self.plan.counts),
            self.preemption.asked,
            len(self.guard.rows),
            self.checkpoints.failed,
        ]
        units, preempted, bad_rows, unsaved = self.ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        if unsaved:
            self.checkpoints.settle()
        if preempted:
            self._preempt()
        least = max(units, 1.0)
        if isinstance(self.optimizer, Sophia) and self.optimizer.due(now.step) and not bad_rows:
            labels = Sampled(self.task, (self.train.seed, now.step))
            if math.isfinite(self._gradients(batches, least, labels)[1]):
                self.optimizer.estimate(least / self._scale**2, now.step)
        loss, norm, terms = (math.nan, math.nan, {}) if bad_rows else self._gradients(batches, least, self.task)
        unscaled = norm / self._scale
        if self._finite(loss, norm, terms):
            with self.watch.statistics(now.step + 1, self.model, self.plan, self._scale):
                self._update(norm)
        self.watch.step(units)
        now.step += 1
        if math.isfinite(loss):
            now.window_loss += loss
            now.window_steps += 1
        now.offset += used
        if now.offset >= self.task.num_examples("train"):
            now.epoch, now.offset = now.epoch + 1, 0
        self._watch(loss, unscaled)
        self._log_step(unscaled)

    def _watch(self, loss: float, norm: float) -> None:
        """See whether training is stable, and make the next steps larger or smaller where that is asked for."""
        now = self.progress
        refused = not math.isfinite(loss) or (self.train.precision != "fp16" and not math.isfinite(norm))
        jumped = instability.watch(now, self.train, loss, norm, self.what, say=self.ranks.rank == 0)
        block = growth.next_block(now, self.train, self.block, trouble=refused or jumped)
        if block != self.block:
            self._resize(block)

    def _checkpoint(self) -> None:
        """Save where it is time to, after the evaluation of the step if there is one."""
        now = self.progress
        periodic = now.step > 0 and now.step % self.train.checkpoint_every == 0
        best = self.train.keep_best and now.step == now.best_step >= self.train.checkpoint_every
        if (periodic or best) and self.checkpoints.due():
            self.save()

    # -- data -------------------------------------------------------------------------------------------------------

    def _fetch(self) -> tuple[list[tuple[Batch, bool]], int]:
        """This rank's micro-batches of the next step, and the examples that all ranks take together.

        A micro-batch that is not real is there only because other ranks have one. The cursor is (seed, epoch, offset): the
        order of an epoch does not depend on the number of ranks.
        """
        now = self.progress
        if self._order[0] != now.epoch:
            rng = np.random.default_rng([self.train.seed, now.epoch])
            # Within an epoch the order stays, whatever the size of the steps.
            now.order_block = (now.offset and now.order_block) or self.block
            self._order = (now.epoch, self.task.order("train", rng, now.order_block))
        index = self._order[1][now.offset : now.offset + self.block]
        size = self.memory.micro_batch(now)
        batches = []
        for start in range(self.plan.rank * size, self.plan.until(len(index), size), self.plan.size * size):
            real = start < len(index)
            rows = index[start : start + size] if real else index[:1]
            rng = np.random.default_rng([self.train.seed, now.epoch, now.offset])
            batch = self.task.augment(self.task.batch("train", rows), rng, start if real else 0)
            self.guard.look(batch, rows)
            batches.append((to_device(self.plan.part(batch), self.device), real))
        return batches, len(index)

    # -- a step's parts ---------------------------------------------------------------------------------------------

    @property
    def _scale(self) -> float:
        return self.progress.scale if self.train.precision == "fp16" else 1.0

    def _gradients(
        self, batches: list[tuple[Batch, bool]], units: float, task: Task
    ) -> tuple[float, float, dict[str, Tensor]]:
        """Leave the step's (scaled) gradient in the parameters.

        Returns:
            The step's loss per unit and the gradient's norm (NaN where the loss is not finite), over all ranks; this
            rank's loss terms.

        Raises:
            Again: a rank had too little memory; all will take less at a time.
            Preempted: SIGTERM came meanwhile; the step is as if it had not begun.
        """
        self.optimizer.zero_grad(set_to_none=True)
        passes = partial(self.cut.passes, self.progress, partial(self._backward, batches, units, task))
        terms = self.memory.attempt(self.progress, passes, self.memory.adapt)
        mine = [float(torch.stack(list(terms.values())).sum()) if terms else 0.0, terms is None, self.cut.left]
        total, short, cut = self.ranks.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        if cut or terms is None or short:
            self.guard.undo()
            if cut:
                self.cut.undo()
                self._preempt()
            self.memory.adapt(self.progress)
            raise Again
        loss = total / units
        if not math.isfinite(loss):
            return loss, math.nan, terms
        self.plan.sum_gradients(self.parameters)
        return loss, self.plan.norm(self.parameters), terms

    def _backward(self, batches: list[tuple[Batch, bool]], units: float, task: Task) -> dict[str, Tensor]:
        """Forward and backward pass of each micro-batch; the sums of this rank's loss terms."""
        sums: dict[str, Tensor] = {}
        for number, (batch, real) in enumerate(self.cut.polled(batches), 1):
            scale = self._scale / units if real else 0.0
            terms = self.plan.backward(task, self.model, batch, scale, last=number == len(batches))
            if real and self.plan.counts:
                sums |= {name: sums.get(name, 0.0) + term for name, term in terms.items()}
        return sums

    def _finite(self, loss: float, norm: float, terms: dict[str, Tensor]) -> bool:
        """Whether the step may touch the weights. Loss and norm are sums over the ranks, so all ranks agree.

        Raises:
            DivergedError: the loss or the gradient is not finite, and `train.nonfinite` does not let the run go on.
        """
        now = self.progress
        if math.isfinite(loss) and math.isfinite(norm):
            now.scale_steps += 1
            return True
        if self.train.precision == "fp16" and math.isfinite(loss) and now.scale > SMALLEST_SCALE:
            now.scale, now.scale_steps = now.scale / 2, 0
        else:
            self.guard.refuse(now, self.total, loss, norm, terms)
        return False

    def _update(self, norm: float) -> None:
        """Unscale and clip the gradient, set the rate, step."""
        now = self.progress
        factor = 1.0 / self._scale
        if self.train.clip and norm * factor > self.train.clip:
            factor *= self.train.clip / (norm * factor)
        if factor != 1.0:
            self.plan.multiply(self.parameters, factor)
        place = growth.place(now, self.train, self.task.num_examples("train"), self.epochs, self.total)
        rate = schedules.factor(*place, self.train) * now.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        with self.memory.update(now):
            self.optimizer.step()
        self.plan.same_buffers(self.model)
        if self.train.precision == "fp16" and now.scale_steps >= GROW_EVERY:
            now.scale, now.scale_steps = now.scale * 2, 0

    def _log_step(self, norm: float) -> None:
        now = self.progress
        loss = now.window_loss / max(now.window_steps, 1)
        self._shown.update(now.step, f"loss {loss:.4f}")
        if (now.step % self.train.log_every and now.step != self.total) or not now.window_steps:
            return
        row = {"step": now.step, "epoch": now.epoch, "lr": self.optimizer.param_groups[-1]["lr"], "train_loss": loss}
        now.history.append(row | ({"grad_norm": norm} if math.isfinite(norm) else {}))
        self.watch.row(now.history[-1])
        now.window_loss, now.window_steps = 0.0, 0

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        now = self.progress
        if now.step == 0 or now.evaluated == now.step:
            return False
        if now.step >= self.total:
            return True
        return now.step % self.train.eval_every == 0 if self.train.eval_every else now.offset == 0

    def _evaluate(self) -> None:
        """Evaluate on the validation split, keep the best weights, and see whether to stop early."""
        now, task = self.progress, self.task
        with self.watch.part("evaluate"):
            metrics = {f"val_{name}": value for name, value in self._measure().items()}
        now.history.append({"step": now.step, **metrics})
        self.watch.row(now.history[-1])
        now.evaluated = now.step
        if self.ranks.rank == 0:
            log.say("", step=now.step, epoch=now.epoch, **metrics)
        gain = metrics[f"val_{task.metric}"] * (1.0 if task.direction == "maximize" else -1.0)
        sound = math.isfinite(gain) and math.isfinite(metrics.get("val_loss", 0.0))
        if not sound:
            self.guard.refuse_score(now, self.total, metrics)
        if sound and (now.best_score is None or gain > now.best_score):
            now.best_score, now.best_step, now.best_metrics = gain, now.step, metrics
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if sound and (now.anchor is None or gain > now.anchor + self.train.early_stopping.threshold):
            now.anchor, now.stale = gain, 0
        else:
            now.stale += 1
            now.stopped = 0 < self.train.early_stopping.patience <= now.stale
        if self.on_eval:
            self.on_eval(now.step, metrics)

    def _measure(self) -> dict[str, float]:
        """Metrics of the validation split: each rank takes a share of the batches; SIGTERM ends it."""
        now, total = self.progress, None

        def tally() -> list[float]:
            size = self.memory.evaluation_batch(now)
            return self.plan.total(self.task, self.model, size, self.preemption).tolist()

        with suppress(Interrupted):
            total = self.memory.attempt(now, tally, self.memory.adapt_evaluation)
        parts = self.ranks.gather((total, self.preemption.asked))
        if any(asked for _, asked in parts):
            # The checkpoint says that this step is not evaluated: the resumed run does that first.
            self._preempt()
        if any(part is None for part, _ in parts):
            self.memory.adapt_evaluation(now)
            return self._measure()
        tallies = [torch.tensor(part, dtype=torch.float64) for part, _ in parts if part]
        return self.task.summarise("val", torch.stack(tallies).sum(0))

    # -- state ------------------------------------------------------------------------------------------------------

    def save(self, *, durable: bool = False) -> None:
        """Save the whole state; `durable` comes back when it is on the disk."""
        now = self.progress
        now.block = self.block
        tree = {
            "model": dict(self.model.state_dict()),
            "optimizer": named_state(self.optimizer, self.model),
            "best": self.best,
            "good": self.guard.state(now),
            "progress": asdict(now),
        }
        name = f"val_{self.task.metric}"
        score = {name: now.best_metrics[name]} if name in now.best_metrics else {}
        best, rng = now.step == now.best_step, {"plan": str(self.plan.dims), **rng_state(self.device)}
        with self.watch.part("checkpoint"):
            self.checkpoints.save(now.step, tree, rng, durable=durable, best=best, score=score)

    def resume(self) -> None:
        """Take the state of the newest good checkpoint, if there is one."""
        loaded = self.checkpoints.load(self.plan.like)
        if loaded is None:
            self.watch.resume(0, -1)
            return
        tree, rng = loaded
        self.model.load_state_dict(tree["model"])
        set_named_state(self.optimizer, self.model, tree["optimizer"])
        self.best = {name: value.to(self.device) for name, value in tree["best"].items()}
        self.guard.load(tree["good"])
        self.progress = Progress(**tree["progress"])
        # Another number of ranks shares the steps as they were: the same gradients, rates and number of steps.
        self._resize(self.progress.block)
        self._shown.resume(self.progress.step)
        self.watch.resume(self.progress.step, self.progress.evaluated)
        if rng is not None and rng["plan"] == str(self.plan.dims):
            set_rng_state(rng, self.device)

    def _preempt(self) -> None:
        """Write a durable checkpoint and leave.

        Raises:
            Preempted: always.
        """
        self.save(durable=True)
        scratch = self.checkpoints.folder
        kept = "a checkpoint was written" if scratch else "nothing was kept, for want of a scratch folder"
        raise Preempted(
            f"{self.what}: SIGTERM at step {self.progress.step} of {self.total}; {kept}",
            "run the same command again to go on from there",
        )
