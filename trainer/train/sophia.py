"""Sophia-G (Liu et al. 2024): momentum divided by an estimate of the curvature, element by element, and clipped.

The estimate is Gauss-Newton-Bartlett's: every `train.sophia.every` steps the gradient for labels drawn from the model's
own outputs is taken, squared and multiplied by the number of units of the step; it needs a forward and a backward pass of
its own. The paper's betas are 0.965 and 0.99.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.config import Train
from trainer.tasks.base import Batch, Task
from trainer.tasks.wrapped import Wrapped
from trainer.train.optimizers import Named, Own, groups, local

# Targets below 0 are no targets: padding of language models.
NO_LABEL = -100


class Sophia(Own):
    """Elementwise; its state is a momentum and the curvature."""

    # The step before which the curvature was last estimated: where that step is begun again, it does not count twice.
    estimated = -1

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Decay, then step by clip(momentum / max(rho x curvature, eps), 1)."""
        momentum, curvature = (local(self.buffers(parameters, name)) for name in ("exp_avg", "hessian"))
        gradients = local(parameter.grad for parameter in parameters)
        values = local(parameters)
        torch._foreach_mul_(values, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(momentum, gradients, 1.0 - group["betas"][0])
        scale = torch._foreach_mul(curvature, group["rho"])
        torch._foreach_clamp_min_(scale, group["eps"])
        step = torch._foreach_div(momentum, scale)
        torch._foreach_clamp_min_(step, -1.0)
        torch._foreach_clamp_max_(step, 1.0)
        torch._foreach_add_(values, step, alpha=-group["lr"])

    def due(self, step: int) -> bool:
        """Whether the curvature is to be estimated before optimizer step number `step` (from 0)."""
        return step % int(self.defaults["every"]) == 0 and step != self.estimated

    @torch.no_grad()
    def estimate(self, units: float, step: int) -> None:
        """Take the gradients, which must be finite, as those of the mean loss over `units` sampled labels, before `step`."""
        self.estimated = step
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = local(parameter.grad for parameter in parameters)
            curvature = local(self.buffers(parameters, "hessian"))
            squares = torch._foreach_mul(gradients, gradients)
            torch._foreach_mul_(squares, units)
            torch._foreach_lerp_(curvature, squares, 1.0 - group["betas"][1])


def sophia(named: Named, train: Train) -> torch.optim.Optimizer:
    """Sophia-G at `train.lr` with `train.betas`, `train.eps` and `train.sophia`."""
    settings = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "rho": train.sophia.rho}
    return Sophia(groups(named, train.weight_decay), {**settings, "every": train.sophia.every})


class Sampled(Wrapped):
    """The task with labels drawn from the model's own outputs in place of the true ones.

    What is drawn for an example depends on the seed and on its inputs alone: not on its micro-batch, nor on the ranks but for
    those that divide its sequence.

    Args:
        base: whose outputs they are.
        seed: what fixes the labels of a step.
    """

    def __init__(self, base: Task, seed: tuple[int, ...]) -> None:
        super().__init__(base)
        self.seed = seed

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, summed over the batch's units."""
        logits = self.forward(model, batch).float()
        labels = draw(logits.detach(), batch["inputs"], self.seed)
        targets = batch["targets"]
        if targets.shape == labels.shape and not targets.is_floating_point():
            labels = labels.masked_fill(targets < 0, NO_LABEL)
        loss = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=NO_LABEL)
        return {"sampled": loss}


def draw(logits: Tensor, inputs: Tensor, seed: tuple[int, ...]) -> Tensor:
    """A label for each place of logits (examples, ..., labels), as torch.multinomial: a race of exponential clocks."""
    generator = torch.Generator(logits.device)
    drawn = []
    for row, content in zip(logits.softmax(-1), inputs.cpu(), strict=True):
        # Padding at the end depends on the other examples of the micro-batch.
        digest = zlib.crc32(content.numpy().tobytes().rstrip(b"\0"))
        generator.manual_seed(int(np.random.SeedSequence([*seed, digest]).generate_state(1)[0]))
        drawn.append((row / torch.empty_like(row).exponential_(generator=generator)).argmax(-1))
    return torch.stack(drawn)
