"""The planner's memory against what a real step allocates on a CPU, counted by torch's profiler."""

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts.dataset import Spec
from trainer.config.load import validate
from trainer.planner.activations import OURS, Habits
from trainer.planner.layout import Layout
from trainer.planner.memory import memory
from trainer.planner.shape import shape_of
from trainer.planner.states import optimizer_of
from trainer.tasks.token_loss import ELEMENTS
from trainer.train import optimizers, wrapped
from trainer.train.device import autocast

# A step outside of the loop, which keeps the best weights, on a CPU.
CPU = Habits(normed_once=True, copy_of_best=False, logits=ELEMENTS["cpu"])
# dim, layers, heads, kv_heads, ff, vocabulary, sequences, length, tied
SHAPES = {
    "wide": (256, 3, 8, 8, 704, 512, 4, 128, True),
    "deep": (96, 10, 4, 2, 256, 512, 4, 128, True),
    "vocabulary": (64, 2, 4, 4, 160, 8000, 4, 128, False),
    "weights": (384, 4, 6, 2, 1024, 2048, 1, 32, False),
}
CASES = {
    "wide, norms of queries, pairs": ("wide", {}),
    "wide": ("wide", {}),
    "wide, bf16, muon": ("wide", {"precision": "bf16", "optimizer": "muon"}),
    "wide, recomputed": ("wide", {"recompute": {"mode": "blocks"}}),
    "wide, every other recomputed": ("wide", {"recompute": {"mode": "blocks", "every": 2}}),
    "deep, selective": ("deep", {"recompute": {"mode": "selective"}}),
    "deep, accumulated, sgd": ("deep", {"accumulation": 2, "optimizer": "sgd"}),
    "deep, bf16, recomputed": ("deep", {"precision": "bf16", "recompute": {"mode": "blocks"}}),
    "vocabulary, bf16": ("vocabulary", {"precision": "bf16"}),
    "weights, sgd with decay": ("weights", {"optimizer": "sgd", "weight_decay": 0.1}),
    "weights, bf16, accumulated": ("weights", {"precision": "bf16", "accumulation": 2}),
    "weights, muon": ("weights", {"optimizer": "muon"}),
    "weights, lion": ("weights", {"optimizer": "lion"}),
}


def peak(run: Callable[[], None]) -> int:
    """Most bytes that torch has allocated at a time while it ran."""
    gc.collect()  # what is freed later was not allocated under the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def case_params(name: str):
    shape, train = CASES[name]
    dim, layers, heads, kv_heads, ff, vocabulary, sequences, length, tied = SHAPES[shape]
    family = {"name": "decoder", "dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ff": ff}
    return validate(
        {
            "task": {"name": "lm"},
            "model": {**family, "tie_embeddings": tied, "qk_norm": "pairs" in name, "bigrams": 600 * ("pairs" in name)},
            "data": {"max_length": length, "tokenizer": {"vocab_size": vocabulary}},
            "train": {"batch_size": sequences, **train},
            "distill": {"enabled": False},
        }
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return tiny_dataset(tmp_path_factory.mktemp("planner") / "dataset", "lm", rows=20)


def steps(params, dataset) -> None:
    """Two optimizer steps of a fresh model: the second finds the optimizer's state already there."""
    shape, train = shape_of(params), params.train
    task = tasks.build(params, dataset)
    model = models.build(params.model, Spec("lm", vocab_size=shape.vocab, max_length=shape.length))
    wrapped.apply(model, train)
    optimizer = optimizers.build(model, train)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(train.accumulation):
            window = torch.randint(1, shape.vocab, (train.batch_size, shape.length + 1))
            batch = {"inputs": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}
            with autocast(train, torch.device("cpu")):
                loss = torch.stack(list(task.losses(model, batch).values())).sum()
            loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_a_real_step_allocates_what_is_planned(name: str, dataset) -> None:
    params = case_params(name)
    planned = memory(shape_of(params), layout_of(params), CPU, gpu=False)
    measured = peak(lambda: steps(params, dataset))
    assert planned.total == pytest.approx(measured, rel=0.1), (planned, measured)


def test_the_loss_is_planned_for_as_it_is_made_on_a_gpu() -> None:
    assert OURS.logits == ELEMENTS["cuda"]


def layout_of(params) -> Layout:
    train = params.train
    return Layout(
        batch=train.batch_size, accumulation=train.accumulation, recompute=train.recompute.mode, every=train.recompute.every,
        precision=train.precision, optimizer=optimizer_of(train),
    )  # fmt: skip


def test_memory_falls_with_everything_that_is_said_to_save_it() -> None:
    shape = replace(shape_of(case_params("wide")), layers=16, length=1024)
    base = Layout(dp_shard=1, batch=8, accumulation=2)
    saves = {
        "a smaller micro-batch": replace(base, batch=4),
        "selective recomputation": replace(base, recompute="selective"),
        "recomputation": replace(base, recompute="blocks"),
        "zero 1": replace(base, dp_shard=8, zero=1),
        "tensor parallel": replace(base, tp=2),
        "pipeline parallel": replace(base, pp=4, parts=8),
        "offload": replace(base, offload=True),
    }

    def total(layout: Layout) -> float:
        return memory(shape, layout, gpu=False).total

    assert {name for name, layout in saves.items() if total(layout) >= total(base)} == set()
    zero = [total(replace(base, dp_shard=8, zero=stage)) for stage in (1, 2, 3)]
    assert zero == sorted(zero, reverse=True)
    assert total(saves["recomputation"]) < total(saves["selective recomputation"])
