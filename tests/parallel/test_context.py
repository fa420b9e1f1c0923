"""Context parallel, and the experts of a mixture divided among ranks: the losses and gradients of one process.

On CPUs context parallel is refused, but its sums are the same there: the ranks of this file take that one refusal away.
All cases run in one start of a few ranks.
"""

from __future__ import annotations

import json
import os

import pytest

from tests import plan_cases
from tests.plan_cases import LONG, Case, assert_equal, assert_same_statistics, numbers, run_cases

pytestmark = pytest.mark.parallel

CP, EP = "parallel.cp=2", "parallel.ep=2"
KEPT = ("train.checkpoint_every=5",)
DECODER = ("model.kv_heads=2", "model.qk_norm=true", "model.bigrams=40")
ZERO3, TP, WHOLE = "parallel.zero=3", "parallel.tp=2", "parallel.sequence_parallel=false"
# name -> (ranks, parameters)
QUICK: dict[str, tuple[int, tuple[str, ...]]] = {"cp2": (2, (CP,)), "cp2-zero3": (2, (CP, ZERO3))}
SLOW: dict[str, tuple[int, tuple[str, ...]]] = {
    "cp2-dp2": (4, (CP,)),
    "cp4-zero1": (4, ("parallel.cp=4", "parallel.zero=1")),
    "cp2-zero3-shard2": (4, (CP, ZERO3, "parallel.dp_shard=2")),
    "cp2-zero2-hsdp": (4, (CP, "parallel.zero=2", "parallel.dp_replicate=2", "train.recompute.mode=blocks")),
    "cp2-tp2": (4, (CP, TP, WHOLE)),
    "cp2-tp2-sequence": (4, (CP, TP)),
    "cp2-pp2": (4, (CP, "parallel.pp=2")),
}
EXPERTS: dict[str, tuple[int, tuple[str, ...]]] = {"ep2": (2, (EP,)), "ep2-zero3": (2, (EP, ZERO3))}
SLOW_EXPERTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ep2-dp2": (4, (EP,)),
    "ep4-zero1": (4, ("parallel.ep=4", "parallel.zero=1")),
    "ep2-hsdp": (4, (EP, "parallel.zero=2", "parallel.dp_replicate=2")),
}
# What ranks find out when they divide the model: name -> ranks, model, parameters, what the message says
REFUSED = {
    "cp-length": (3, "decoder", ("parallel.cp=3", "data.max_length=510"), "made with data.max_length=16"),
    "ep-uneven": (3, "ngram", ("parallel.ep=3",), "3 does not divide the 4 experts of blocks.0.experts"),
}


def mixture(spec):
    """A classifier with four experts in each of two blocks, of which each token meets the best."""
    import torch
    from torch import nn

    from trainer.models.experts import Experts

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 4)
            self.experts = Experts(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4))

        def forward(self, x):
            flat = x.flatten(0, 1)
            weight, chosen = self.gate(flat).softmax(-1).max(-1)
            return x + (self.experts(flat, chosen) * weight[:, None]).view_as(x)

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(spec.vocab_size, 16)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.output = nn.Linear(16, spec.num_labels)

        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
            return self.output(torch.mean(x, 1))

    return Mixture()


def attention_of_two(folder):
    """Write how far attention of places, and its gradients, are from attention of whole sequences."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from trainer.models.ops import causal_attention
    from trainer.parallel.context import Context
    from trainer.parallel.group import process_group

    found = {}
    with process_group("auto", 60.0, torch.device("cpu")):
        context = Context(init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)), 2, 60.0)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            whole = [torch.randn(2, 3, 24, 8).to(dtype).requires_grad_() for _ in range(3)]
            parts = [context.take(each.detach(), 2).requires_grad_() for each in whole]
            weight = torch.randn(2, 3, 24, 8).to(dtype)
            expected, (query, key, value) = causal_attention(*whole), parts
            (expected * weight).sum().backward()
            mine = context.attention(query, context.gather(key, 2), context.gather(value, 2))
            (mine * context.take(weight, 2)).sum().backward()
            pairs = [(mine, expected), *((part.grad, each.grad) for part, each in zip(parts, whole, strict=True))]
            far = [float((ours - context.take(theirs, 2)).abs().max()) for ours, theirs in pairs]
            found[str(dtype)] = [max(far), float(context.gather(parts[0], 2).sub(whole[0]).abs().max())]
        results = [None, None]
        dist.all_gather_object(results, found)
    if os.environ["RANK"] == "0":
        (folder / "attention.json").write_text(json.dumps(results))


def main(folder):
    """One rank: the attention of two, then the trainings."""
    from trainer import models
    from trainer.parallel import plan

    if int(os.environ["RANK"]) < 2:
        os.environ |= {"WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "attention"}
        attention_of_two(folder)
    check, build = plan.check_axes, models.build
    plan.check_axes = lambda dims, device, has_experts: check(dims, "cuda", has_experts)
    models.build = lambda config, spec: mixture(spec) if config.name == "ngram" else build(config, spec)
    plan_cases.main(folder)


def cases():
    """The cases of `make test`: two ranks."""
    made = [Case("one", 1, DECODER), Case("mixture", 1, (), "ngram")]
    made += [Case(name, ranks, (*words, *DECODER)) for name, (ranks, words) in QUICK.items()]
    made += [Case(name, ranks, words, "ngram") for name, (ranks, words) in EXPERTS.items()]
    made += [
        Case("cp-killed", 2, (CP, ZERO3, *DECODER, *KEPT), scratch="cp", stop=8, batch=8),
        Case("cp-alone", 1, (*DECODER, *KEPT), scratch="cp-alone", source="cp", batch=8),
        Case("ep-killed", 2, (EP, *KEPT), "ngram", scratch="ep", stop=8, batch=4),
        Case("ep-alone", 1, KEPT, "ngram", scratch="ep-alone", source="ep", batch=4),
        Case("ep-again", 2, (EP, *KEPT), "ngram", scratch="ep-again", source="ep", batch=4),
    ]
    return made


def slow_cases():
    """50 steps under every product, and what takes more ranks."""
    made = [Case("one", 1, (*DECODER, LONG)), Case("mixture", 1, (LONG,), "ngram")]
    made += [Case(name, ranks, (*words, *DECODER, LONG)) for name, (ranks, words) in {**QUICK, **SLOW}.items()]
    made += [Case(name, ranks, (*words, LONG), "ngram") for name, (ranks, words) in {**EXPERTS, **SLOW_EXPERTS}.items()]
    dropout = (CP, ZERO3, "parallel.dp_shard=2", "model.dropout=0.2", *DECODER, *KEPT)
    made += [
        Case("straight", 4, dropout),
        Case("stopped", 4, dropout, scratch="bits", stop=8),
        Case("resumed", 4, dropout, scratch="bits"),
        Case("alone-killed", 1, (*DECODER, *KEPT), scratch="alone", stop=8, batch=8),
        Case("alone-cp", 4, (CP, ZERO3, TP, *DECODER, *KEPT), scratch="alone-cp", source="alone", batch=8),
        Case("mixture-killed", 1, KEPT, "ngram", scratch="mixture", stop=8, batch=8),
        Case("mixture-ep", 4, (EP, "parallel.zero=2", *KEPT), "ngram", scratch="mixture-ep", source="mixture", batch=8),
        Case("ep4-killed", 4, ("parallel.ep=4", *KEPT), "ngram", scratch="ep4", stop=8, batch=2),
        Case("ep4-ep2", 2, (EP, ZERO3, *KEPT), "ngram", scratch="ep4-ep2", source="ep4", batch=2),
    ]  # fmt: skip
    return made + [Case(f"{name}-refused", n, words, model, batch=1) for name, (n, model, words, _) in REFUSED.items()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    found = run_cases(folder, cases(), work=main)
    return {**found, "attention": json.loads((folder / "attention.json").read_text())}


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("context"), slow_cases(), 290.0, main)


def test_attention_of_places_is_that_of_whole_sequences(results):
    """Output and gradients of queries, keys and values, on both ranks."""
    for found in results["attention"]:
        assert found["torch.float32"][0] < 1e-5
        assert found["torch.bfloat16"][0] < 0.1
        assert found["torch.float32"][1] == found["torch.bfloat16"][1] == 0.0


@pytest.mark.parametrize("name", QUICK)
def test_divided_sequences_are_learnt_as_whole_ones(results, name):
    assert len(numbers(results[name])) == 12
    assert_equal(results[name], results["one"])
    assert_same_statistics(results[name], results["one"])


@pytest.mark.parametrize("name", EXPERTS)
def test_divided_experts_learn_as_in_one_process(results, name):
    assert len(numbers(results[name])) == 12
    assert_equal(results[name], results["mixture"])
    assert results[name]["statistics"][0] == pytest.approx(results["mixture"]["statistics"][0], rel=1e-3)


@pytest.mark.parametrize(("name", "one"), [("cp-alone", "one"), ("ep-alone", "mixture"), ("ep-again", "mixture")])
def test_a_checkpoint_of_divided_sequences_or_experts_goes_on(results, name, one):
    # That of step 6 is of the end of an epoch: it is left out where that of step 5 is still being written.
    assert results[name]["resumed"] in (5, 6)
    assert numbers(results[name]) == pytest.approx(numbers(results[one]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_divided_sequences_are_learnt_as_whole_ones_under_every_product(slow_results, name):
    assert len(numbers(slow_results[name])) == 50
    assert_equal(slow_results[name], slow_results["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXPERTS, *SLOW_EXPERTS])
def test_divided_experts_learn_as_in_one_process_under_every_product(slow_results, name):
    assert len(numbers(slow_results[name])) == 50
    assert_equal(slow_results[name], slow_results["mixture"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "one"), [("alone-cp", "one"), ("mixture-ep", "mixture"), ("ep4-ep2", "mixture")])
def test_a_checkpoint_goes_on_where_sequences_or_experts_are_divided(slow_results, name, one):
    assert slow_results[name]["resumed"] in (5, 6)
    assert numbers(slow_results[name]) == pytest.approx(numbers(slow_results[one])[:12], rel=1e-6)


@pytest.mark.slow
def test_with_dropout_the_same_plan_goes_on_with_the_same_bits(slow_results):
    straight, resumed = slow_results["straight"], slow_results["resumed"]
    assert resumed["resumed"] == 5
    for what in ("losses", "norms", "evaluations", "weights"):
        assert resumed[what] == straight[what], what


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused(slow_results, name):
    assert REFUSED[name][3] in slow_results[f"{name}-refused"]["error"]
