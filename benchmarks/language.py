"""Language modelling: bits per byte after a fixed time of training, beside Hugging Face Trainer's GPT-2, AdamW and Muon.

python benchmarks/language.py [SECONDS] [section.key=value ...]        (150 seconds by default)

All learn the preset code-lm's data (Python's standard library) with its tokenizer, one after the other on all cores, in
bf16 where the processor has instructions for it. The peers are GPT-2s of like size, one with AdamW and one with torch's
Muon for the matrices; they are left out where transformers is missing. How many steps fit into the time is measured first,
on a model that is thrown away; evaluation is not counted. Goal: 1.55 on the validation split, on 2 cores.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainer
from trainer import models, tasks
from trainer.artifacts.dataset import Dataset
from trainer.config import Params
from trainer.config.load import load
from trainer.cores import num_cores
from trainer.stage import execute
from trainer.train.fit import fit
from trainer.train.muon import Together
from trainer.train.state import seed_all

SECONDS = 150.0
PROBE_STEPS = 16


class Clock:
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, *_: object) -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())

    def step(self) -> float:
        """Seconds of a step, without the first, which sets things up."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))

    def total(self) -> float:
        """Seconds of all steps; the first counts as the others."""
        return self.ends[-1] - self.ends[0] + self.step()


class Logits(nn.Module):
    """A model of transformers as one of ours: tokens to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary)."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def ours(params: Params, dataset: Dataset, steps: int) -> tuple[nn.Module, Clock]:
    """Our model after so many steps, evaluated once at the end."""
    params = params.model_copy(update={"train": params.train.model_copy(update={"max_steps": steps, "eval_every": 0})})
    clock = Clock()
    seed_all(params.train.seed)
    model = models.build(params.model, dataset.spec)
    return fit(params, tasks.build(params, dataset), model, on_step=clock).model, clock


def peer(params: Params, dataset: Dataset, steps: int, muon: bool = False) -> tuple[nn.Module, Clock]:
    """GPT-2 after so many steps of transformers.Trainer, with as many layers as fit the size of our model."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    length, given = dataset.spec.max_length, params.model.model_dump()
    size = models.num_parameters(models.build(params.model, dataset.spec))
    width = given["dim"] // 64 * 64 or given["dim"]
    layers = max(1, round((size - (dataset.spec.vocab_size + length) * width) / (12 * width * width)))
    seed_all(params.train.seed)
    config = GPT2Config(
        vocab_size=dataset.spec.vocab_size, n_positions=length, n_embd=width, n_layer=layers, n_head=max(1, width // 32),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    task, clock = tasks.build(params, dataset), Clock()

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return task.num_examples("train")

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            # Trainer's model shifts the labels itself.
            import numpy as np

            tokens = task.batch("train", np.asarray([index]))["inputs"][0]
            return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == 0, -100)}

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=params.train.batch_size, learning_rate=2e-3,
            lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.1, adam_beta2=0.95,
            max_grad_norm=1.0, bf16=params.train.precision == "bf16", use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", seed=params.train.seed,
        )  # fmt: skip
        given_one = (both(model), None) if muon else (None, None)
        Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Ends()], optimizers=given_one).train()
    return Logits(model.eval()), clock


def both(model: nn.Module) -> torch.optim.Optimizer:
    """Muon of torch for the matrices of the blocks, AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in named if not (p.ndim == 2 and ".h." in name)]
    return Together(
        [
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95),
            torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        ]
    )


def row(name: str, make: Any, params: Params, dataset: Dataset, seconds: float) -> str:
    """A line of the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        probe = make(params, dataset, PROBE_STEPS)[1].step()
        model, clock = make(params, dataset, max(PROBE_STEPS, round(seconds / probe)))
        task = tasks.build(params, dataset)
        val, test = (task.evaluate(model, split, 32)["bits_per_byte"] for split in ("val", "test"))
    tokens = len(clock.ends) * params.train.batch_size * params.train.accumulation * dataset.spec.max_length
    size = models.num_parameters(model) / 1e6
    return (
        f"{name:<28}{size:>8.2f}{len(clock.ends):>8}{clock.total():>9.0f}{tokens / clock.total():>10,.0f}"
        f"{val:>12.3f}{test:>12.3f}"
    )


def main() -> None:
    words = sys.argv[1:]
    seconds = float(words.pop(0)) if words and "=" not in words[0] else SECONDS
    fast = ["train.precision=bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    params = load(Path(trainer.__file__).parent / "presets" / "code-lm.yaml", [*fast, *words])
    torch.set_num_threads(params.train.threads or num_cores())
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.redirect_stdout(io.StringIO()):
            execute("preprocess", params, {}, {"dataset": f"{temporary}/dataset"})
        dataset = Dataset(f"{temporary}/dataset")
        print(f"{'':<28}{'M par.':>8}{'steps':>8}{'seconds':>9}{'tokens/s':>10}{'val bits/B':>12}{'test bits/B':>12}")
        print(row(f"millrace {params.train.optimizer}", ours, params, dataset, seconds), flush=True)
        try:
            print(row("HF Trainer GPT-2 AdamW", peer, params, dataset, seconds), flush=True)
            print(row("HF Trainer GPT-2 Muon", partial(peer, muon=True), params, dataset, seconds), flush=True)
        except ImportError as error:
            print(f"HF Trainer: left out ({error}); pip install --group bench")


if __name__ == "__main__":
    main()
