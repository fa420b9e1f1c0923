"""Every plan against one process: the same losses, resume on other numbers of ranks under other plans, the same bits."""

from __future__ import annotations

import pytest

from tests.plan_cases import Case, run_cases

pytestmark = pytest.mark.parallel

SEQUENCE, WHOLE = "parallel.sequence_parallel=true", "parallel.sequence_parallel=false"
# name -> (ranks, parameters)
PLANS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (4, ()),
    "zero1": (4, ("parallel.zero=1",)),
    "zero2": (4, ("parallel.zero=2",)),
    "zero3": (4, ("parallel.zero=3",)),
    "hsdp": (4, ("parallel.zero=3", "parallel.dp_replicate=2")),
    "tp2": (2, ("parallel.tp=2", WHOLE)),
    "tp4-sequence": (4, ("parallel.tp=4", SEQUENCE)),
    "tp2-ddp": (4, ("parallel.tp=2", WHOLE)),
    "tp2-sequence-zero3": (4, ("parallel.tp=2", "parallel.zero=3", SEQUENCE)),
}
SHORT = "train.max_steps=16"
# Other families, 16 steps each: name -> (model, ranks, parameters)
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
SAVED = {"zero3": PLANS["zero3"], "tp2-sequence-zero3": PLANS["tp2-sequence-zero3"], "ddp": PLANS["ddp"]}
DROPOUT = ("model.dropout=0.2", "train.optimizer=adamw")


def cases() -> list[Case]:
    made = [Case("one", 1)]
    made += [Case(name, ranks, words) for name, (ranks, words) in PLANS.items()]
    for name, (model, ranks, words) in FAMILIES.items():
        plain = tuple(word for word in words if not word.startswith("parallel."))
        made += [Case(f"{name}-one", 1, (*plain, SHORT), model), Case(name, ranks, (*words, SHORT), model)]
    for name in ("ddp", "zero1", "zero3"):
        ranks, words = PLANS[name]
        made.append(Case(f"{name}-accumulated", 2, (*words, "train.accumulation=4", SHORT)))
    for name, (ranks, words) in SAVED.items():
        batch = 4 if "tp2" in name else 2
        made.append(Case(f"{name}-killed", ranks, (*words, *KEPT), scratch=name, stop=13, batch=batch))
        for other, (fewer, changed) in RESUMES.items():
            made.append(
                Case(f"{name}-{other}", fewer, (*changed, *KEPT), scratch=f"{name}-{other}", source=name, batch=batch)
            )
    for name in ("hsdp", "tp2-sequence-zero3"):
        ranks, words = PLANS[name]
        words = (*words, *KEPT, *DROPOUT)
        made.append(Case(f"{name}-straight", ranks, words))
        made.append(Case(f"{name}-stopped", ranks, words, scratch=f"{name}-bits", stop=13))
        made.append(Case(f"{name}-resumed", ranks, words, scratch=f"{name}-bits"))
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("plans"), cases())


def numbers(result, what="losses"):
    assert "error" not in result, result["error"]
    return [float.fromhex(value) for value in result[what]]


@pytest.mark.parametrize("name", PLANS)
def test_the_losses_of_a_plan_are_those_of_one_process(results, name):
    assert len(numbers(results[name])) == 50
    assert numbers(results[name]) == pytest.approx(numbers(results["one"]), rel=5e-6)
    assert numbers(results[name], "norms") == pytest.approx(numbers(results["one"], "norms"), rel=1e-4)
    assert numbers(results[name], "evaluations") == pytest.approx(numbers(results["one"], "evaluations"), rel=5e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_divided_family_learns_as_in_one_process(results, name):
    assert numbers(results[name]) == pytest.approx(numbers(results[f"{name}-one"]), rel=5e-6)
    assert numbers(results[name], "norms") == pytest.approx(numbers(results[f"{name}-one"], "norms"), rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_eight_micro_batches_of_one_equal_one_of_eight(results, name):
    assert numbers(results[f"{name}-accumulated"]) == pytest.approx(numbers(results["one"])[:16], rel=1e-6)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("other", RESUMES)
def test_a_checkpoint_goes_on_under_another_plan_at_another_number_of_ranks(results, name, other):
    found = results[f"{name}-{other}"]
    assert found["resumed"] == 10
    assert numbers(found) == pytest.approx(numbers(results["one"])[:16], rel=1e-6)


@pytest.mark.parametrize("name", ["hsdp", "tp2-sequence-zero3"])
def test_the_same_plan_goes_on_with_the_same_bits(results, name):
    straight, resumed = results[f"{name}-straight"], results[f"{name}-resumed"]
    assert resumed["resumed"] == 10
    for what in ("losses", "norms", "evaluations", "weights"):
        assert resumed[what] == straight[what], what
