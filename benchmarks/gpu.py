"""Tokens per second and MFU of GPT-2 124M on one GPU: ours as it is trained, nanoGPT and HF Trainer, in one call.

python benchmarks/gpu.py --nanogpt DIR    # DIR: a clone of github.com/karpathy/nanoGPT; without it that row is left out

The shape of the preset gpt2-124m, random tokens, bf16, all compiled. Between two of our steps each of the others makes one.
MFU is of the dense peak of the device's datasheet (trainer/parallel/gpus.py), by the arithmetic of our model for all;
`unknown` where the table has no such device. Where there is no GPU it says so and ends with status 2. Goals: 1.3 times
nanoGPT, an MFU of 55 %.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trainer
from benchmarks.peers.gpts import WARM_UP, Contender, Shape, hf_trainer, nanogpt, race, table
from trainer import models
from trainer.artifacts.dataset import Spec
from trainer.config import Params
from trainer.config.load import load
from trainer.cores import num_cores
from trainer.monitor.utilisation import flops_per_token
from trainer.parallel import gpus

PRESET = Path(trainer.__file__).parent / "presets" / "gpt2-124m.yaml"
# GPT-2's vocabulary, made a multiple of 64 as nanoGPT does.
SHAPE = Shape(layers=12, width=768, heads=12, length=1024, batch=16, ff=2048, vocab=50304)


def mfu(params: Params, shape: Shape, device: str, speed: float) -> str:
    """The share of the device's peak that so many tokens per second are, in words; `device` as its driver names it."""
    with torch.device("meta"):
        model = models.build(params.model, Spec("lm", vocab_size=shape.vocab, max_length=shape.length))
    flops, peak = flops_per_token(model, shape.length), gpus.peak(device, "bf16")
    return f"   MFU {flops * speed / peak:.1%}" if flops and peak else "   MFU unknown"


def contenders(shape: Shape, device: str, steps: int, folder: Path | None) -> dict[str, Contender]:
    """The peers that are at hand, in bf16 and compiled."""
    found: dict[str, Contender] = {}
    if folder:
        found["nanoGPT"] = nanogpt(folder, shape, device, torch.bfloat16, True, num_cores())
    else:
        print("nanoGPT is left out: --nanogpt names no clone of it")
    try:
        found["HF Trainer"] = hf_trainer(shape, device, True, True, steps + 1, num_cores())
    except ImportError as error:
        print(f"HF Trainer is left out ({error}); pip install --group bench")
    return found


def compare(shape: Shape, device: str, name: str, steps: int, folder: Path | None) -> str:
    """The table of all contenders on a device that its driver calls `name`."""
    words = [
        *shape.words(), f"train.max_steps={steps + WARM_UP}", "train.precision=bf16", "train.compile=true",
        "train.processes=1", f"train.device={device}",
    ]  # fmt: skip
    params = load(PRESET, words)
    taken = race(params, shape, device, contenders(shape, device, steps + WARM_UP, folder))
    return table(taken, shape.tokens, lambda speed: mfu(params, shape, name, speed))


def main() -> int:
    """Print the table; 2 where there is no GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--steps", type=int, default=50, help="of each contender, after the first few")
    parser.add_argument("--batch", type=int, default=SHAPE.batch, help="sequences of 1024 tokens in a step")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: torch sees no GPU here")
        return 2
    # nanoGPT's train.py and HF Trainer's tf32 allow it too; what is left of fp32 is small in bf16.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    shape = Shape(**{**vars(SHAPE), "batch": args.batch})
    name = torch.cuda.get_device_name()
    print(f"GPT-2 124M on {name}, torch {torch.__version__}, {shape.tokens} tokens a step, {args.steps} steps each")
    print(compare(shape, "cuda", name, args.steps, args.nanogpt))
    return 0


if __name__ == "__main__":
    sys.exit(main())
