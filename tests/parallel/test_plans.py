"""Every plan against one process: the same losses, resume on other numbers of ranks under other plans, the same bits."""

from __future__ import annotations

import pytest

from tests.plan_cases import Case, assert_same_statistics, run_cases

pytestmark = pytest.mark.parallel

SEQUENCE, WHOLE = "parallel.sequence_parallel=true", "parallel.sequence_parallel=false"
# name -> (ranks, parameters)
PLANS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (4, ()),
    "zero1": (2, ("parallel.zero=1",)),
    "zero2": (2, ("parallel.zero=2",)),
    "zero3": (4, ("parallel.zero=3",)),
    "hsdp": (4, ("parallel.zero=3", "parallel.dp_replicate=2")),
    "tp2": (2, ("parallel.tp=2", WHOLE)),
    "tp4-sequence": (4, ("parallel.tp=4", SEQUENCE)),
    "tp2-ddp": (4, ("parallel.tp=2", WHOLE)),
    "tp2-sequence-zero3": (4, ("parallel.tp=2", "parallel.zero=3", SEQUENCE)),
}
SHORT = "train.max_steps=12"
SLOW = ("tp4-sequence", "tp2-ddp")
# Other families, 12 steps each: name -> (model, ranks, parameters)
FAMILIES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "encoder-tp2-sequence-zero2": ("encoder", 4, ("parallel.tp=2", "parallel.zero=2", SEQUENCE)),
    "vit-tp4": ("vit", 4, ("parallel.tp=4", WHOLE)),
    "ngram-zero3": ("ngram", 2, ("parallel.zero=3",)),
    "cnn-zero3": ("cnn", 2, ("parallel.zero=3",)),
    "gqa-untied-tp2": (
        "decoder",
        2,
        ("parallel.tp=2", "model.kv_heads=2", "model.tie_embeddings=false", "model.qk_norm=true"),
    ),
}
KEPT = ("train.checkpoint_every=5", SHORT)
# What was saved at 4 ranks under the first goes on under the others at 3, 2 and 1.
RESUMES: dict[str, tuple[int, tuple[str, ...]]] = {
    "zero3-at-3": (3, ("parallel.zero=3",)),
    "tp2-at-2": (2, ("parallel.tp=2",)),
    "alone": (1, ()),
}
DROPOUT = ("model.dropout=0.2", "train.optimizer=adamw")
REFUSED = {
    "adafactor": (("parallel.zero=3", "train.optimizer=adafactor"), "adafactor needs whole parameters"),
    "heads": (
        ("parallel.tp=2", "model.heads=4", "model.kv_heads=1"),
        "parallel.tp: 2 does not divide model.kv_heads (1)",
    ),
    "product": (("parallel.tp=4",), "tp 4 = 4 does not divide the number of ranks, 2"),
    "context": (("parallel.cp=2",), "context parallel is for GPUs"),
}


def slow_cases() -> list[Case]:
    """What `make test` has no time for: other families, costly products, resumes from them."""
    made = [Case("one", 1), *(Case(name, *PLANS[name]) for name in SLOW)]
    for name, (model, ranks, words) in FAMILIES.items():
        plain = tuple(word for word in words if not word.startswith("parallel."))
        made += [Case(f"{name}-one", 1, (*plain, SHORT), model), Case(name, ranks, (*words, SHORT), model)]
    return [*made, *resumes("tp2-sequence-zero3", 4)]


def resumes(name: str, batch: int) -> list[Case]:
    """A case that is killed under a plan at 4 ranks, and those that go on from its checkpoint under others."""
    ranks, words = PLANS[name]
    made = [Case(f"{name}-killed", ranks, (*words, *KEPT), scratch=name, stop=8, batch=batch)]
    for other, (fewer, changed) in RESUMES.items():
        words = (*changed, *KEPT)
        made.append(Case(f"{name}-{other}", fewer, words, scratch=f"{name}-{other}", source=name, batch=batch))
    return made


def cases() -> list[Case]:
    """The cases of `make test`."""
    made = [Case("one", 1)]
    made += [Case(name, ranks, words) for name, (ranks, words) in PLANS.items() if name not in SLOW]
    for name in ("ddp", "zero1", "zero3"):
        ranks, words = PLANS[name]
        made.append(Case(f"{name}-accumulated", 2, (*words, "train.accumulation=4", SHORT)))
    made += resumes("zero3", 2)
    ranks, words = PLANS["tp2-sequence-zero3"]
    words = (*words, *KEPT, *DROPOUT)
    made.append(Case("straight", ranks, words))
    made.append(Case("stopped", ranks, words, scratch="bits", stop=8))
    made.append(Case("resumed", ranks, words, scratch="bits"))
    made += [Case(f"{name}-refused", 2, words, batch=4) for name, (words, _) in REFUSED.items()]
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("plans"), cases())


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("plans"), slow_cases())


def numbers(result, what="losses"):
    assert "error" not in result, result["error"]
    return [float.fromhex(value) for value in result[what]]


def assert_equal(result, one):
    assert len(numbers(result)) == len(numbers(one))
    assert numbers(result) == pytest.approx(numbers(one), rel=5e-6)
    assert numbers(result, "norms") == pytest.approx(numbers(one, "norms"), rel=1e-4)
    assert numbers(result, "evaluations") == pytest.approx(numbers(one, "evaluations"), rel=5e-6)


@pytest.mark.parametrize("name", [name for name in PLANS if name not in SLOW])
def test_the_losses_of_a_plan_are_those_of_one_process(results, name):
    assert len(numbers(results["one"])) == 50
    assert_equal(results[name], results["one"])


@pytest.mark.parametrize("name", [name for name in PLANS if name not in SLOW])
def test_statistics_of_blocks_are_over_all_ranks(results, name):
    assert_same_statistics(results[name], results["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_losses_of_a_costly_plan_are_those_of_one_process(slow_results, name):
    assert_equal(slow_results[name], slow_results["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_divided_family_learns_as_in_one_process(slow_results, name):
    assert_equal(slow_results[name], slow_results[f"{name}-one"])


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_eight_micro_batches_of_one_equal_one_of_eight(results, name):
    assert numbers(results[f"{name}-accumulated"]) == pytest.approx(numbers(results["one"])[:12], rel=1e-6)


@pytest.mark.parametrize("other", RESUMES)
def test_a_checkpoint_goes_on_under_another_plan_at_another_number_of_ranks(results, other):
    assert results[f"zero3-{other}"]["resumed"] == 5
    assert numbers(results[f"zero3-{other}"]) == pytest.approx(numbers(results["one"])[:12], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("other", RESUMES)
def test_a_checkpoint_of_a_product_goes_on_without_it(slow_results, other):
    assert slow_results[f"tp2-sequence-zero3-{other}"]["resumed"] == 5
    assert numbers(slow_results[f"tp2-sequence-zero3-{other}"]) == pytest.approx(
        numbers(slow_results["one"])[:12], rel=1e-6
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_on_all_ranks(results, name):
    assert REFUSED[name][1] in results[f"{name}-refused"]["error"]


def test_the_same_plan_goes_on_with_the_same_bits(results):
    straight, resumed = results["straight"], results["resumed"]
    assert resumed["resumed"] == 5
    for what in ("losses", "norms", "evaluations", "weights"):
        assert resumed[what] == straight[what], what
