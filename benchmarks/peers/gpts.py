"""Training steps of GPTs of one shape: ours, nanoGPT's and Hugging Face Trainer's, in turn.

All train on random tokens with AdamW, decay 0.1, betas 0.9 and 0.95, clipping at 1 and no dropout. Between two steps of
our own loop each of the others makes one, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.artifacts.dataset import SPLITS, Dataset, Spec, spec_meta
from trainer.config import Params
from trainer.train.fit import fit
from trainer.train.state import seed_all

WARM_UP = 3
Step = Callable[[], None]
# Of a contender: the number of its parameters, and what makes a step of it.
Contender = tuple[int, Step]


@dataclass(frozen=True)
class Shape:
    """A GPT with heads of width / heads; `ff` is the width of our feed-forward layer, of as many parameters as 4 x width."""

    layers: int
    width: int
    heads: int
    length: int
    batch: int
    ff: int
    vocab: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.length * self.batch

    def words(self) -> list[str]:
        """The shape as parameters of ours."""
        return [
            f"model.dim={self.width}", f"model.layers={self.layers}", f"model.heads={self.heads}",
            f"model.kv_heads={self.heads}", f"model.ff={self.ff}", f"train.batch_size={self.batch}",
            "train.accumulation=1", "train.optimizer=adamw", "train.weight_decay=0.1", "train.eval_every=1000000",
        ]  # fmt: skip


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
    folder: Path, shape: Shape, device: str, dtype: torch.dtype | None, compiled: bool, cores: int
) -> Contender:
    """A step of the train.py of a clone of github.com/karpathy/nanoGPT."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    with contextlib.redirect_stdout(io.StringIO()):
        config = GPTConfig(shape.length, shape.vocab, shape.layers, shape.heads, shape.width, dropout=0.0, bias=False)
        model = GPT(config).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with stock(cores):
            inputs, targets = torch.randint(shape.vocab, (2, shape.batch, shape.length)).to(device)
            with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
                _, loss = run(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return models.num_parameters(model), step


def hf_trainer(shape: Shape, device: str, bf16: bool, compiled: bool, steps: int, cores: int) -> Contender:
    """A step of transformers.Trainer over its GPT-2, in its own loop, which stops after each; at most `steps` of them.

    Raises:
        ImportError: transformers or accelerate is missing.
    """
    import accelerate  # noqa: F401
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return shape.batch * steps

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.randint(shape.vocab, (shape.length,))
            return {"input_ids": tokens, "labels": tokens}

    def loop(pause: Step) -> None:
        class Pauses(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                pause()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=shape.batch, learning_rate=1e-3, weight_decay=0.1,
                adam_beta2=0.95, max_grad_norm=1.0, bf16=bf16, torch_compile=compiled, use_cpu=device == "cpu",
                disable_tqdm=True, report_to=[], save_strategy="no", logging_strategy="no",
            )  # fmt: skip
            Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[Pauses()]).train()

    go_on = in_turns(loop)

    def step() -> None:
        with stock(cores):
            go_on()

    return models.num_parameters(model), step


def apart(make: Callable[[], Contender]) -> Contender:
    """A contender in a process of its own, with torch and the C library as they come; the process ends with this one.

    Args:
        make: called there; it must be picklable.

    Raises:
        ImportError: `make` has raised it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(make, theirs), daemon=True).start()
    theirs.close()
    said = ours.recv()
    if isinstance(said, ImportError):
        raise said

    def step() -> None:
        ours.send(True)
        ours.recv()

    return int(said), step


def _serve(make: Callable[[], Contender], pipe: Connection) -> None:
    """Make the contender, and a step of it whenever the other process asks for one."""
    try:
        size, step = make()
    except ImportError as error:
        pipe.send(error)
        return
    pipe.send(size)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            step()
            pipe.send(True)


def in_turns(loop: Callable[[Step], None]) -> Step:
    """Run `loop(pause)` in a thread of its own, from one `pause()` to the next at each call of what this returns.

    What the loop raises is raised from the call. A loop that is not at its end when the program is, is dropped.
    """
    mine, its = threading.Semaphore(0), threading.Semaphore(0)
    failures: list[BaseException] = []

    def pause() -> None:
        mine.release()
        its.acquire()

    def run() -> None:
        its.acquire()
        try:
            loop(pause)
        except BaseException as error:
            failures.append(error)
        mine.release()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def step() -> None:
        its.release()
        mine.acquire()
        if failures:
            raise failures[0]

    return step


def race(params: Params, shape: Shape, device: str, others: dict[str, Contender]) -> dict[str, list[float]]:
    """Seconds of each step of each contender: `ours` in our training loop, and the others in turn with it.

    Args:
        params: of ours; `train.max_steps` counts the steps, of which the first `WARM_UP` are not given back.
        shape: of all.
        device: cpu or cuda.
        others: name -> what it is and does.
    """
    seed_all(0)
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_tokens(Path(folder), shape.vocab, shape.length, shape.batch * params.train.max_steps)
        model = models.build(params.model, dataset.spec)
        size = models.num_parameters(model)
        for name, (count, _) in others.items():
            if abs(count / size - 1) > 0.02:
                raise ValueError(f"{name} has {count:,} parameters, ours {size:,}")
        taken: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
        before = 0.0

        def wait() -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step(step: int, total: int, _: torch.nn.Module) -> None:
            nonlocal before
            now = wait()
            if step > WARM_UP:
                taken["ours"].append(now - before)
            for name, (_, other) in others.items():
                start = wait()
                other()
                if step > WARM_UP:
                    taken[name].append(wait() - start)
            before = wait()

        fit(params, tasks.build(params, dataset), model, on_step=on_step)
    return taken


def random_tokens(folder: Path, vocab: int, length: int, windows: int) -> Dataset:
    """A dataset of random tokens: so many windows of the train split, and one of each other split."""
    random, meta = np.random.default_rng(0), {"rows": {}, "tokens": {}, "bytes": {}}  # type: ignore[var-annotated]
    for split in SPLITS:
        tokens = random.integers(2, vocab, (windows if split == "train" else 1) * length + 1)
        (folder / split).mkdir()
        np.save(folder / split / "tokens.npy", tokens.astype(np.uint16))
        np.save(folder / split / "offsets.npy", np.asarray([0, len(tokens)], np.int64))
        meta["rows"][split], meta["tokens"][split], meta["bytes"][split] = 1, len(tokens), len(tokens)
    spec = Spec("lm", vocab_size=vocab, max_length=length)
    manifest.seal(folder, "dataset", {**meta, "spec": spec_meta(spec), "task": "lm"}, {})
    return Dataset(folder)


def table(taken: dict[str, list[float]], tokens: int, further: Callable[[float], str] = lambda _: "") -> str:
    """Tokens per second of each contender and how many times as fast ours is: minimum, median and maximum of the steps.

    Args:
        taken: as `race` gives it.
        tokens: of a step.
        further: what else to say of a contender, from its median of tokens per second.
    """
    rows = [f"  {'':22}{'tokens/s: min':>14}{'median':>10}{'max':>10}   {'ours is, x: min':>15}{'median':>8}{'max':>8}"]
    for name, seconds in taken.items():
        speeds = [tokens / second for second in seconds]
        ratios = [theirs / ours for theirs, ours in zip(seconds, taken["ours"], strict=True)]
        low, middle, high = min(speeds), statistics.median(speeds), max(speeds)
        rows.append(
            f"  {name:22}{low:14,.0f}{middle:10,.0f}{high:10,.0f}   "
            f"{min(ratios):15.2f}{statistics.median(ratios):8.2f}{max(ratios):8.2f}{further(middle)}"
        )
    return "\n".join(rows)
