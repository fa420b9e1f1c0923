"""What to do about a step whose inputs, loss or gradient are not finite: nothing of it may reach the weights.

`train.nonfinite.policy` says what comes then. `stop` ends the run. `skip` leaves the step out: its examples are used
up, and the step counts. `rollback` does that too, and puts the model and the optimizer back to where they were at the
last multiple of `train.checkpoint_every` steps, with the rate times `lr_factor` from then on. The count of steps, the
schedule and the cursor of the data never go back, so the batch that did the harm is not met again (Chowdhery et al. 2022,
section 5.1, went back and passed over batches too).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer import log
from trainer.config import Train
from trainer.errors import DivergedError
from trainer.parallel.group import Ranks
from trainer.parallel.plan import local
from trainer.tasks.base import Batch
from trainer.train.named_state import named_state, set_named_state
from trainer.train.state import Progress

HINT = "lower train.lr, set train.clip=1.0 or train.warmup=0.1, or use train.precision=fp32"
# So many rows are named.
NAMED = 8


class Guard:
    """Watches the steps of a run.

    Args:
        train: the section.
        model: as it is trained.
        optimizer: its optimizer.
        ranks: the ranks that train along; they come to the same decisions.
        what: the name that messages use.
    """

    def __init__(
        self, train: Train, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, what: str
    ) -> None:
        self.train, self.model, self.optimizer, self.ranks, self.what = train, model, optimizer, ranks, what
        self.rows: list[int] = []
        self._good: dict[str, Any] = {}
        state = model.state_dict(keep_vars=True)
        # Running means and the like, which a forward pass changes; what can be computed anew is not in the state.
        self._buffers = [buffer for name, buffer in model.named_buffers() if name in state]
        self._before: list[Tensor] = []

    def begin(self, now: Progress) -> None:
        """A step begins: keep what may have to be put back."""
        self.rows = []
        self._before = [buffer.clone() for buffer in self._buffers]
        if self.train.nonfinite.policy != "rollback" or self._good.get("step") == now.step:
            return
        if not self._good or (now.step % self.train.checkpoint_every == 0 and self._weights_are_finite()):
            kept = {"model": dict(self.model.state_dict()), "optimizer": named_state(self.optimizer, self.model)}
            self._good = {"step": now.step, **_copy(kept, host=True)}

    def look(self, batch: Batch, index: np.ndarray) -> None:
        """Note the rows of a micro-batch whose inputs are not finite. `batch` is still in the host's memory."""
        for value in batch.values():
            # The sum is not finite if one value is not, and costs least.
            if value.is_floating_point() and not math.isfinite(value.sum()):
                self.rows += index[~value.flatten(1).isfinite().all(1).numpy()].tolist()

    def refuse(self, now: Progress, total: int, loss: float, norm: float, terms: dict[str, Tensor]) -> None:
        """Do what the policy says about a step that is not finite; called on all ranks, before the weights are touched.

        Args:
            now: the state of the run, before the step is counted.
            total: steps of the run.
            loss: of the step, over all ranks; NaN where the inputs were not finite.
            norm: of the gradient.
            terms: this rank's loss terms.

        Raises:
            DivergedError: the policy is `stop`, or its limit is reached.
        """
        reason, hint = self._reason(loss, norm, terms)
        self.undo()
        self._act(now, f"step {now.step + 1} of {total}: {reason}; the weights were not changed", hint)

    def undo(self) -> None:
        """Drop what the forward and backward passes of the step have left."""
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def refuse_score(self, now: Progress, total: int, metrics: dict[str, float]) -> None:
        """Do what the policy says about an evaluation that is not finite; its weights never count as the best.

        Raises:
            DivergedError: the policy is `stop`, or its limit is reached.
        """
        wrong = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
        self._act(now, f"evaluation after step {now.step} of {total}: {wrong} is not finite", HINT)

    def at_end(self, now: Progress) -> None:
        """Raise a DivergedError if no evaluation of the run was finite: there are no weights worth keeping."""
        if now.best_score is None:
            raise DivergedError(f"{self.what}: no evaluation was finite", HINT)

    def state(self, now: Progress) -> dict[str, Any]:
        """What a checkpoint must hold besides the run's state, so that a resumed run goes back to where this one would."""
        return {} if self._good.get("step") == now.step else self._good

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self._good = state

    def _act(self, now: Progress, message: str, hint: str) -> None:
        """Stop, count, or go back."""
        policy, limit = self.train.nonfinite.policy, self.train.nonfinite.limit
        if policy == "stop":
            raise DivergedError(f"{self.what}: {message}", hint)
        count = now.skipped if policy == "skip" else now.rollbacks
        if count == limit:
            raise DivergedError(f"{self.what}: {message}, after {count} of its kind (train.nonfinite.limit)", hint)
        if policy == "skip":
            now.skipped += 1
            done = f"left out ({now.skipped} so far)"
        else:
            now.rollbacks += 1
            now.lr_scale *= self.train.nonfinite.lr_factor
            self._go_back()
            done = f"back to the weights of step {self._good['step']}, rate times {now.lr_scale:g} from here on"
        now.history.append({"step": now.step, "event": f"{message}: {done}"})
        if self.ranks.rank == 0:
            log.say(f"{self.what}: {message}: {done}")

    def _go_back(self) -> None:
        """Put model and optimizer back to the last good state."""
        self.model.load_state_dict(self._good["model"])
        # A copy: the optimizer takes the tensors themselves, and would change them.
        set_named_state(self.optimizer, self.model, _copy(self._good["optimizer"]))

    def _weights_are_finite(self) -> bool:
        mine = all(bool(local(parameter).isfinite().all()) for parameter in self.model.parameters())
        return all(self.ranks.gather(mine))

    def _reason(self, loss: float, norm: float, terms: dict[str, Tensor]) -> tuple[str, str]:
        """What is not finite, by name, from what all ranks have seen; and what to do about it."""
        names = [name for name, value in terms.items() if not value.isfinite()]
        # By place and name: ranks that have other parts of the model have other parameters there.
        wrong = (
            (number, name)
            for number, (name, parameter) in enumerate(self.model.named_parameters())
            if parameter.grad is not None and not local(parameter.grad).isfinite().all()
        )
        first = next(wrong, None) if math.isfinite(loss) else None
        seen = self.ranks.gather((self.rows, names, first))
        rows = sorted({row for part in seen for row in part[0]})
        if rows:
            more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
            which = ", ".join(map(str, rows[:NAMED]))
            return (
                f"inputs are not finite in rows {which}{more} of the train split",
                "correct these rows (they are counted from 0 in train/rows.parquet), or set train.nonfinite.policy=skip",
            )
        if not math.isfinite(loss):
            bad = sorted({name for part in seen for name in part[1]})
            ranks = [str(rank) for rank, part in enumerate(seen) if part[1]]
            where = f" on rank {' and '.join(ranks)}" if len(seen) > 1 else ""
            return f"loss {loss} is not finite, in term {' and '.join(bad)}{where}", HINT
        found = [part[2] for part in seen if part[2]]
        where = f"first in {min(found)[1]}" if found else "too large to be summed up"
        return f"gradient norm {norm} is not finite, {where}", HINT


def _copy(tree: Any, *, host: bool = False) -> Any:
    """A deep copy of dicts, lists and tensors, the tensors in the host's memory if asked for."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True) if host else tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _copy(value, host=host) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copy(value, host=host) for value in tree)
    return tree
