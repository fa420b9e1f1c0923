"""Every plan against one process over 50 steps, pipelines too; other families; resumes from a product."""

from __future__ import annotations

import pytest

from tests.parallel import test_pipeline
from tests.parallel.test_plans import PLANS, RESUMES, SEQUENCE, WHOLE, resumes
from tests.plan_cases import LONG, Case, assert_equal, numbers, run_cases

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.timeout(600)]

# name -> (model, ranks, parameters)
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
PRODUCT = "tp2-sequence-zero3"


def cases() -> list[Case]:
    """All of them."""
    made = [Case("one", 1, (LONG,)), Case("one-of-four", 1, (LONG, test_pipeline.FOUR))]
    made += [Case(name, ranks, (*words, LONG)) for name, (ranks, words) in PLANS.items()]
    for name, (ranks, words) in test_pipeline.PLANS.items():
        made.append(Case(f"pipeline {name}", ranks, (test_pipeline.PIPE, *words, test_pipeline.FOUR, LONG)))
    for name, (model, ranks, words) in FAMILIES.items():
        plain = tuple(word for word in words if not word.startswith("parallel."))
        made += [Case(f"{name}-one", 1, plain, model), Case(name, ranks, words, model)]
    return [*made, *resumes(PRODUCT, 4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("plans"), cases(), deadline_s=500.0)


@pytest.mark.parametrize("name", PLANS)
def test_the_losses_of_a_plan_are_those_of_one_process_over_50_steps(results, name):
    assert len(numbers(results["one"])) == 50
    assert_equal(results[name], results["one"])


@pytest.mark.parametrize("name", test_pipeline.PLANS)
def test_the_losses_of_a_pipeline_are_those_of_one_process_over_50_steps(results, name):
    assert len(numbers(results["one-of-four"])) == 50
    assert_equal(results[f"pipeline {name}"], results["one-of-four"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_divided_family_learns_as_in_one_process(results, name):
    assert_equal(results[name], results[f"{name}-one"])


@pytest.mark.parametrize("other", RESUMES)
def test_a_checkpoint_of_a_product_goes_on_without_it(results, other):
    resumed = results[f"{PRODUCT}-{other}"]
    assert resumed["resumed"] == 5
    assert numbers(resumed) == pytest.approx(numbers(results["one"])[:12], rel=1e-6)
