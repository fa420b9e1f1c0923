"""Tokens per second of small GPTs on a CPU: ours as it is trained, a bare loop over the same model, and nanoGPT.

python benchmarks/gpt.py --nanogpt DIR    # DIR: a clone of github.com/karpathy/nanoGPT; without it that row is left out

Ours is the real training loop, with precision, compilation and threads left to `auto`. Between two of its steps each of
the others makes one, so that what else the machine does hits all alike; peers run with torch as it comes. All clip and use
AdamW with the same shapes, no dropout, and as many parameters within 2 %. The overhead of our loop is its time over that of
a bare forward, backward, clip and step of the same model with the same settings. Goals: 1.3 times nanoGPT's fp32 for the
small one, 1.1 times its best for the large one, an overhead below 3 %.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.cores import num_cores
from trainer.tasks.token_loss import token_loss
from trainer.train import optimizers
from trainer.train.device import autocast
from trainer.train.fit import fit
from trainer.train.state import seed_all

# name -> layers, width, heads, length, batch, width of our feed-forward layer, steps
SIZES = {"0.83 M": (4, 128, 4, 64, 12, 344, 30), "10.8 M": (6, 384, 6, 256, 16, 1024, 5)}
WARM_UP = 3


@contextlib.contextmanager
def stock(cores: int) -> Iterator[None]:
    """Torch as it comes: all cores, and none of our settings."""
    settings: Any = torch.backends.mkldnn
    threads, products = torch.get_num_threads(), settings.matmul.fp32_precision
    strict = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(cores)
    torch.use_deterministic_algorithms(False)
    settings.matmul.fp32_precision = "none"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        settings.matmul.fp32_precision = products


def nanogpt(
    folder: Path, size: str, vocab: int, dtype: torch.dtype | None, compiled: bool, cores: int
) -> tuple[int, Callable[[], None]]:
    """Number of parameters of nanoGPT's model, and a step of its train.py with it."""
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    layers, width, heads, length, batch, _, _ = SIZES[size]
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(GPTConfig(length, vocab, layers, heads, width, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with stock(cores):
            inputs, targets = torch.randint(vocab, (2, batch, length))
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                _, loss = run(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return models.num_parameters(model), step


def bare(params: Any, model: torch.nn.Module, vocab: int, length: int) -> Callable[[], None]:
    """A step of a loop that does nothing else, with what `auto` has chosen for ours."""
    optimizer = optimizers.build(model, params.train)

    def step() -> None:
        inputs, targets = torch.randint(vocab, (2, params.train.batch_size, length))
        with autocast(params.train, torch.device("cpu")):
            loss = model(inputs, finish=partial(token_loss, targets=targets)) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(size: str, folder: Path | None, compiled: bool, place: Path, cores: int) -> dict[str, list[float]]:
    """Seconds of each step of each contender."""
    layers, width, heads, length, batch, ff, steps = SIZES[size]
    threads = f"train.threads={'auto' if cores == num_cores() else cores}"
    words = [
        "task.name=lm", "model.name=decoder", f"model.dim={width}", f"model.layers={layers}", f"model.heads={heads}",
        f"model.kv_heads={heads}", f"model.ff={ff}", "distill.enabled=false", f"train.batch_size={batch}",
        f"train.max_steps={steps + WARM_UP}", "train.eval_every=1000000", "train.optimizer=adamw", "train.weight_decay=0.1",
        "train.precision=auto", "train.compile=auto", threads, "train.device=cpu",
    ]  # fmt: skip
    dataset = tiny_dataset(place / size.replace(" ", ""), "lm", rows=3000, max_length=length)
    params = load(None, words)
    vocab = dataset.spec.vocab_size
    seed_all(0)
    model = models.build(params.model, dataset.spec)
    taken: dict[str, list[float]] = {"ours": [], "bare loop": []}
    others: dict[str, Callable[[], None]] = {}
    if folder:
        kinds = [("nanoGPT fp32", None, False), ("nanoGPT bf16", torch.bfloat16, False)]
        if compiled:
            kinds += [("nanoGPT fp32 compiled", None, True), ("nanoGPT bf16 compiled", torch.bfloat16, True)]
        for name, dtype, built in kinds:
            count, others[name] = nanogpt(folder, size, vocab, dtype, built, cores)
            taken[name] = []
            assert abs(count / models.num_parameters(model) - 1) < 0.02, (count, models.num_parameters(model))
    before = 0.0

    def on_step(step: int, total: int, trained: torch.nn.Module) -> None:
        nonlocal before
        now = time.perf_counter()
        if step == 1:
            choice = load(None, [*words[:-4], f"train.precision={chosen_precision(trained)}", "train.device=cpu"])
            others["bare loop"] = bare(choice, models.build(params.model, dataset.spec).train(), vocab, length)
        if step > WARM_UP:
            taken["ours"].append(now - before)
        for name, other in others.items():
            start = time.perf_counter()
            other()
            if step > WARM_UP:
                taken[name].append(time.perf_counter() - start)
        before = time.perf_counter()

    precision = ""

    def chosen_precision(_: torch.nn.Module) -> str:
        return precision or "fp32"

    task = tasks.build(params, dataset)
    losses = task.losses

    def watched(model: torch.nn.Module, batch: Any) -> Any:
        nonlocal precision
        precision = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
        return losses(model, batch)

    task.losses = watched  # type: ignore[method-assign]
    fit(params, task, model, on_step=on_step)
    return taken


def main() -> None:
    """Print tokens per second of all contenders, and the goals."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--compiled", action="store_true", help="nanoGPT compiled too (minutes)")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of all contenders; all cores by default")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    args = parser.parse_args()
    if not args.nanogpt:
        print("nanoGPT is left out: --nanogpt names no clone of it")
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes:
            _, _, _, length, batch, _, _ = SIZES[size]
            taken = measure(size, args.nanogpt, args.compiled, Path(place), args.threads)
            print(f"\nGPT {size}, {args.threads} threads, {length * batch} tokens a step: tokens/s")
            for name, seconds in taken.items():
                speeds = sorted(length * batch / second for second in seconds)
                ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds, taken["ours"], strict=True))
                print(f"  {name:22} min {speeds[0]:8,.0f}  median {statistics.median(speeds):8,.0f}  max {speeds[-1]:8,.0f}"
                      f"  ours is {ratio:.2f} x")  # fmt: skip


if __name__ == "__main__":
    main()
