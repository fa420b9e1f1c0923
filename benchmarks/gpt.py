"""Tokens per second of small GPTs on a CPU: ours as it is trained, nanoGPT and HF Trainer.

python benchmarks/gpt.py --nanogpt DIR    # DIR: a clone of github.com/karpathy/nanoGPT; without it that row is left out

Ours is the real training loop, with precision, compilation and threads left to `auto`. Between two of its steps each of
the others makes one, so that what else the machine does hits all alike; each has a process of its own, with torch as it
comes. All have as many parameters within 2 %. HF Trainer is left out where transformers is missing. Goals: 1.3 times
nanoGPT's fp32 for the small one, 1.1 times its best for the large one. What the loop takes by itself: overhead.py.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.gpts import WARM_UP, Contender, Shape, apart, hf_trainer, nanogpt, race, table
from trainer.config.load import load
from trainer.cores import num_cores

# name -> shape, steps
SIZES = {
    "0.83 M": (Shape(layers=4, width=128, heads=4, length=64, batch=12, ff=344, vocab=320), 30),
    "10.8 M": (Shape(layers=6, width=384, heads=6, length=256, batch=16, ff=1024, vocab=320), 15),
}


def contenders(shape: Shape, steps: int, folder: Path | None, compiled: bool, cores: int) -> dict[str, Contender]:
    """The peers that are at hand."""
    found: dict[str, Contender] = {}
    kinds = [(None, False), (torch.bfloat16, False), *([(None, True), (torch.bfloat16, True)] if compiled else [])]
    for dtype, built in kinds if folder else []:
        name = f"nanoGPT {'bf16' if dtype else 'fp32'}{' compiled' if built else ''}"
        found[name] = apart(partial(nanogpt, Path(folder or ""), shape, "cpu", dtype, built, cores))
    for bf16 in (False, True):
        try:
            peer = partial(hf_trainer, shape, "cpu", bf16, False, steps + 1, cores)
            found[f"HF Trainer {'bf16' if bf16 else 'fp32'}"] = apart(peer)
        except ImportError as error:
            print(f"HF Trainer is left out ({error}); pip install --group bench")
            break
    return found


def main() -> None:
    """Print tokens per second of all contenders, and how many times as fast ours is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--compiled", action="store_true", help="nanoGPT compiled too (minutes)")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of all contenders; all cores by default")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    args = parser.parse_args()
    if not args.nanogpt:
        print("nanoGPT is left out: --nanogpt names no clone of it")
    threads = "auto" if args.threads == num_cores() else args.threads
    for size in args.sizes:
        shape, steps = SIZES[size]
        steps += WARM_UP
        words = [
            *shape.words(), "task.name=lm", "model.name=decoder", "distill.enabled=false", f"train.max_steps={steps}",
            "train.precision=auto", "train.compile=auto", f"train.threads={threads}", "train.device=cpu",
        ]  # fmt: skip
        peers = contenders(shape, steps, args.nanogpt, args.compiled, args.threads)
        taken = race(load(None, words), shape, "cpu", peers)
        print(f"\nGPT {size}, {args.threads} threads, {shape.tokens} tokens a step, {len(taken['ours'])} steps each")
        print(table(taken, shape.tokens), flush=True)


if __name__ == "__main__":
    main()
