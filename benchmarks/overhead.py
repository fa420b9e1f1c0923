"""What the training loop costs beside its model: ours against a bare forward, backward, clip and step.

python benchmarks/overhead.py [--steps 100] [--threads N]

The model is the GPT of 0.83 M parameters (4 layers of width 128, 12 windows of 64 tokens), about 38 ms a step on two cores.
Ours is the real loop with the defaults of a language model: it makes the batches, counts, looks for what is not finite,
watches for instability and logs. After each of its steps a copy of the model makes the same step in a bare loop, with the
same batch, optimizer and settings; at the end both must have the same weights. Figures are of pairs of steps, in wall time
and in processor time, which depends less on what else the machine does. The last line is the goal.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpt import SIZES
from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config import Params
from trainer.config.load import load
from trainer.cores import num_cores
from trainer.tasks.base import Batch
from trainer.tasks.token_loss import token_loss
from trainer.train import optimizers
from trainer.train.fit import fit
from trainer.train.schedules import factor
from trainer.train.state import seed_all

WARM_UP = 5
GOAL = 0.03
# Wall time, processor time.
Times = tuple[float, float]


def clocks() -> Times:
    """Wall time and processor time of all threads, seconds."""
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    """Wall and processor time since `start`."""
    now = clocks()
    return now[0] - start[0], now[1] - start[1]


def bare(params: Params, model: nn.Module, steps: int) -> Callable[[Batch], None]:
    """A step of a loop that does nothing else."""
    optimizer = optimizers.build(model, params.train)
    done = 0

    def step(batch: Batch) -> None:
        nonlocal done
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor(done, steps, params.train)
        targets = batch["targets"]
        (model(batch["inputs"], finish=partial(token_loss, targets=targets)) / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.train.clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

    return step


def measure(steps: int, threads: int) -> tuple[list[Times], list[Times], float]:
    """Times of our steps and of the bare ones, in pairs, and the largest difference between their weights."""
    shape, _ = SIZES["0.83 M"]
    words = [
        *shape.words(), "task.name=lm", "model.name=decoder", "distill.enabled=false", "train.device=cpu",
        f"train.max_steps={steps + WARM_UP}", f"train.threads={threads}", "train.precision=fp32",
        "train.compile=false",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        dataset = tiny_dataset(Path(place) / "dataset", "lm", rows=3000, max_length=shape.length)
        params = load(None, words)
        seed_all(0)
        model = models.build(params.model, dataset.spec)
        other = copy.deepcopy(model).train()
        step = bare(params, other, steps + WARM_UP)
        task = tasks.build(params, dataset)
        losses, batch, start = task.losses, Batch(), clocks()
        ours: list[Times] = []
        theirs: list[Times] = []

        def seen(trained: nn.Module, given: Batch) -> dict[str, Tensor]:
            nonlocal batch
            batch = given
            return losses(trained, given)

        def on_step(number: int, total: int, trained: nn.Module) -> None:
            nonlocal start
            ours.append(since(start))
            start = clocks()
            step(batch)
            theirs.append(since(start))
            start = clocks()

        task.losses = seen  # type: ignore[method-assign]
        fit(params, task, model, scratch=Path(place) / "scratch", on_step=on_step)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    apart = max(float((mine - its).detach().abs().max()) for mine, its in pairs)
    return ours[WARM_UP:], theirs[WARM_UP:], apart


def main() -> None:
    """Print milliseconds of a step and the overhead."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=num_cores())
    args = parser.parse_args()
    ours, theirs, apart = measure(args.steps, args.threads)
    print(f"\n{args.steps} pairs of steps, {args.threads} threads; the weights differ by {apart:.1e} at most")
    print(
        f"{'min / median / max':<18}{'ours, ms':>24}{'bare loop, ms':>24}{'overhead of pairs, %':>26}{'of medians':>14}"
    )
    for name, which in (("wall time", 0), ("processor time", 1)):
        mine, its = ([1e3 * times[which] for times in each] for each in (ours, theirs))
        over = [100 * (a / b - 1) for a, b in zip(mine, its, strict=True)]
        medians = 100 * (statistics.median(mine) / statistics.median(its) - 1)
        print(f"{name:<18}{spread(mine):>24}{spread(its):>24}{spread(over):>26}{medians:>12.1f} %")
    print(f"goal: less than {100 * GOAL:.0f} %")


def spread(values: list[float], places: int = 1) -> str:
    """Minimum, median and maximum."""
    return " / ".join(f"{value:.{places}f}" for value in (min(values), statistics.median(values), max(values)))


if __name__ == "__main__":
    main()
