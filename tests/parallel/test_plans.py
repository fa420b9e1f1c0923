"""Plans against one process: the same losses, resume on other numbers of ranks under other plans, the same bits.

Over a few steps; over 50, with other families and more resumes: test_plans_long.py.
"""

from __future__ import annotations

import pytest

from tests.plan_cases import Case, assert_equal, assert_same_statistics, numbers, run_cases

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
KEPT = ("train.checkpoint_every=5",)
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
    "product": (("parallel.tp=4",), "parallel: tp 4 does not divide the number of ranks, 2"),
    "context": (("parallel.cp=2",), "context parallel is for GPUs"),
}


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
    made += [Case(name, *plan) for name, plan in PLANS.items()]
    for name in ("ddp", "zero1", "zero3"):
        ranks, words = PLANS[name]
        made.append(Case(f"{name}-accumulated", 2, (*words, "train.accumulation=4")))
    made += resumes("zero3", 2)
    ranks, words = PLANS["tp2-sequence-zero3"]
    words = (*words, *KEPT, *DROPOUT)
    made.append(Case("straight", ranks, words))
    made.append(Case("stopped", ranks, words, scratch="bits", stop=8))
    made.append(Case("resumed", ranks, words, scratch="bits"))
    made += [Case(f"{name}-refused", 2, words, batch=4) for name, (words, _) in REFUSED.items()]
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def results(folder):
    return run_cases(folder, cases())


@pytest.mark.parametrize("name", PLANS)
def test_the_losses_of_a_plan_are_those_of_one_process(results, name):
    assert len(numbers(results["one"])) == 12
    assert_equal(results[name], results["one"])


def test_ranks_say_nothing_of_what_is_inside_of_torch(results, folder):
    logs = {path.name: path.read_text() for path in folder.glob("log-*.txt")}
    assert len(logs) == 4
    assert not {name: said for name, said in logs.items() if "Warning" in said or "torch/" in said}


@pytest.mark.parametrize("name", PLANS)
def test_statistics_of_blocks_are_over_all_ranks(results, name):
    assert_same_statistics(results[name], results["one"])


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_eight_micro_batches_of_one_equal_one_of_eight(results, name):
    assert numbers(results[f"{name}-accumulated"]) == pytest.approx(numbers(results["one"]), rel=1e-6)


@pytest.mark.parametrize("other", RESUMES)
def test_a_checkpoint_goes_on_under_another_plan_at_another_number_of_ranks(results, other):
    assert results[f"zero3-{other}"]["resumed"] == 5
    assert numbers(results[f"zero3-{other}"]) == pytest.approx(numbers(results["one"]), rel=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_on_all_ranks(results, name):
    assert REFUSED[name][1] in results[f"{name}-refused"]["error"]


def test_the_same_plan_goes_on_with_the_same_bits(results):
    straight, resumed = results["straight"], results["resumed"]
    assert resumed["resumed"] == 5
    for what in ("losses", "norms", "evaluations", "weights"):
        assert resumed[what] == straight[what], what
