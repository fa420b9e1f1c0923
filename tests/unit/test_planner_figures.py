"""The planner against published runs, and against what torch itself counts."""

import math
from dataclasses import replace

import pytest
import torch

from trainer import models, plugins, presets
from trainer.artifacts.dataset import Spec
from trainer.config import Train
from trainer.config.load import validate
from trainer.config.model import Decoder
from trainer.config.text import parse_yaml
from trainer.monitor.utilisation import flops_per_token
from trainer.parallel.gpus import GIB, gpu
from trainer.planner.activations import Habits
from trainer.planner.layout import Layout
from trainer.planner.memory import memory
from trainer.planner.shape import Shape, shape_of
from trainer.planner.states import STATES, optimizer_of, state_bytes
from trainer.planner.throughput import FAST, SLOW, step_times
from trainer.train import optimizers

GPT2 = Shape(768, 12, 12, 12, 2048, 50257, 1024, tied=True)
LLAMA2_7B = Shape(4096, 32, 32, 32, 11008, 32000, 4096, tied=False)
LLAMA_8B = Shape(4096, 32, 32, 8, 14336, 128256, 8192, tied=False)
LLAMA_70B = Shape(8192, 80, 64, 8, 28672, 128256, 8192, tied=False)
# torchtitan: weights are gathered and blocks run in bfloat16; recomputation keeps every second product (`op` selective).
TITAN = Habits(
    autocast=False, gathered=2, copy_of_best=False, kept=("query", "value", "attended", "gate", "down"), logits=0
)
FSDP_8 = Layout(dp_shard=8, zero=3, batch=2, recompute="selective")

# benchmarks/llama3_h100_202412_torchtitan.md: GiB that torch's allocator has reserved.
MEMORY = {
    "8B on 8, eager": (LLAMA_8B, FSDP_8, 82.4),
    "8B on 8, compiled": (LLAMA_8B, FSDP_8, 77.0),
    "8B on 8, compiled, float8": (LLAMA_8B, FSDP_8, 76.8),
    "8B on 128, eager": (LLAMA_8B, replace(FSDP_8, dp_shard=128), 67.0),
    "8B on 128, compiled": (LLAMA_8B, replace(FSDP_8, dp_shard=128), 62.0),
    "8B on 8, 32k tokens": (
        replace(LLAMA_8B, length=32768),
        Layout(dp_shard=8, zero=3, batch=1, recompute="blocks"),
        83.9,
    ),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_within_15_percent_of_torchtitans(case: str) -> None:
    shape, layout, published = MEMORY[case]
    found = memory(shape, layout, TITAN)
    reserved = (found.total - found.parts["driver and libraries"]) / GIB
    assert reserved == pytest.approx(published, rel=0.15)


# Tokens per second of a GPU: torchtitan's tables, nanoGPT's README, foundation-model-stack/fms-fsdp#89.
SPEED = {
    "8B on 8, eager": (LLAMA_8B, FSDP_8, "h100", 5762),
    "8B on 8, compiled": (LLAMA_8B, replace(FSDP_8, compiled=True), "h100", 6667),
    "8B on 128": (LLAMA_8B, replace(FSDP_8, dp_shard=128, compiled=True), "h100", 6514),
    "8B on 64, tp 8": (LLAMA_8B, replace(FSDP_8, tp=8, batch=12, compiled=True), "h100", 4378),
    "70B on 256, tp 8": (
        LLAMA_70B,
        Layout(dp_shard=32, tp=8, zero=3, batch=16, recompute="blocks", compiled=True),
        "h100",
        597,
    ),
    "7B on 128": (LLAMA2_7B, Layout(dp_shard=128, zero=3, batch=2, compiled=True), "h100", 9600),
    "GPT-2 on 8": (GPT2, Layout(dp_replicate=8, batch=12, accumulation=5, compiled=True), "a100-80", 107_000),
}


@pytest.mark.parametrize("case", SPEED)
def test_a_published_speed_lies_in_the_range(case: str) -> None:
    shape, layout, kind, published = SPEED[case]
    low, high = (
        layout.sequences * shape.length / step_times(shape, layout, gpu(kind), 8, pace, TITAN).total / layout.gpus
        for pace in (SLOW, FAST)
    )
    assert low <= published <= high
    assert high < 2.2 * low


SIZES = {
    "gpt2-124m": 124e6, "llama-8b": 8.03e9, "vishwam-10b": 10e9, "ultra-3b": 3e9, "ultra-13b": 13e9, "ultra-52b": 52e9,
    "ultra-390b": 130e9,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_arithmetic_are_those_of_the_model_itself(name: str) -> None:
    params = validate(parse_yaml(presets.text(name), name))
    shape = shape_of(params)
    with torch.device("meta"):
        model = models.build(params.model, Spec("lm", vocab_size=shape.vocab, max_length=shape.length))
    assert shape.num_parameters == models.num_parameters(model)
    assert shape.num_parameters == pytest.approx(SIZES[name], rel=0.25)
    assert shape.flops_per_token == pytest.approx(flops_per_token(model, shape.length), rel=1e-3)


@pytest.mark.parametrize("name", plugins.OPTIMIZERS)
def test_states_are_as_large_as_the_optimizers(name: str) -> None:
    train = Train.model_validate({"optimizer": name, "galore": {"rank": 16}})
    config = Decoder(dim=64, layers=2, heads=2, kv_heads=1, ff=160, tie_embeddings=False)
    model = models.build(config, Spec("lm", vocab_size=500, max_length=8))
    optimizer = optimizers.build(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    each, ends = state_bytes(Shape(64, 2, 2, 1, 160, 500, 8, tied=False), optimizer_of(train))
    assert each * 2 + ends == pytest.approx(math.fsum(value.numel() * value.element_size() for value in kept), rel=1e-6)


def test_norms_of_queries_and_pairs_of_tokens_count() -> None:
    values = {"name": "decoder", "dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "qk_norm": True, "bigrams": 300}
    params = validate({"task": {"name": "lm"}, "model": values, "distill": {"enabled": False}})
    model = models.build(params.model, Spec("lm", vocab_size=params.data.tokenizer.vocab_size, max_length=8))
    assert shape_of(params).num_parameters == models.num_parameters(model)


def test_every_optimizer_is_in_the_table() -> None:
    assert set(STATES) == set(plugins.OPTIMIZERS)
