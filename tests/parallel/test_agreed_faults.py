"""A fault on one of two ranks: neither hangs, both decide alike, and weights stay equal. All cases share one group."""

from __future__ import annotations

import json
import signal

import pytest

from tests.parallel import fault_ranks
from tests.parallel.fault_ranks import CASES, TOLD
from tests.parallel.test_train_ranks import TWO, WORDS, Run
from tests.ranks import run_ranks
from tests.tiny import tiny_dataset
from trainer import models
from trainer.config.load import load
from trainer.tasks.classify import Classify
from trainer.train import inject
from trainer.train.fit import fit
from trainer.train.state import seed_all

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    tiny_dataset(place / "data", "classify", rows=160)
    run_ranks(fault_ranks.main, place)
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, *TOLD])
def test_both_ranks_come_to_the_same(outcomes, case):
    assert outcomes[0][case] == outcomes[1][case]


@pytest.mark.parametrize("case", ["memory of one rank", "memory of both ranks"])
def test_a_step_begun_again_is_the_same_step(outcomes, case):
    found = outcomes[0][case]
    assert found["losses"] == pytest.approx(outcomes[0]["undisturbed"]["losses"], abs=1e-6)
    assert [event.split(": ")[1][:22] for event in found["events"]] == [
        "micro-batches of 2 ins",
        "micro-batches of 1 ins",
    ]


def test_no_memory_at_all_ends_both(outcomes):
    assert "too little for step 3, with micro-batches of 1" in outcomes[1]["no memory at all"]["error"]


def test_the_rank_and_the_parameter_at_fault_are_named_on_both(outcomes):
    assert "step 5 of 10: loss nan is not finite, in term injected on rank 1" in outcomes[0]["stop"]["error"]
    assert "gradient norm nan is not finite, first in " in outcomes[1]["stop at a gradient"]["error"]
    for case in ("stop", "stop at a gradient"):
        assert outcomes[0][case]["digests"] == outcomes[0]["undisturbed"]["digests"][:4]


@pytest.mark.parametrize("how", ["", "divided "])
def test_a_refused_step_changes_no_weight_on_any_rank(outcomes, how):
    skip, rollback = outcomes[1][f"{how}skip"]["digests"], outcomes[1][f"{how}rollback"]["digests"]
    assert skip[4] == skip[3] != skip[5]
    assert rollback[5] == rollback[3] != rollback[4]
    assert len(set(rollback)) == len(rollback) - 1


def test_an_evaluation_in_smaller_batches_is_the_same(outcomes):
    found = outcomes[0]["evaluation"]
    assert found["metrics"] == pytest.approx(outcomes[0]["undisturbed"]["metrics"], abs=1e-6)
    assert found["events"][-1].endswith("evaluations in batches of 4 instead of 8")


def test_one_rank_is_told_to_end_and_both_leave_at_the_same_place(outcomes):
    found = {case: outcomes[0][case]["error"].removeprefix("train: SIGTERM ").split(";")[0] for case in TOLD}
    assert found == {
        "told in an evaluation": "at step 4 of 10",
        "told in an evaluation, divided": "at step 4 of 10",
        "told between micro-batches": "at step 0 of 10",
        "told in a measurement": "while `auto` was measured",
    }


def test_a_rank_that_aborts_is_named_and_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv(inject.VARIABLE, "abort@3:rank1")
    dataset = tiny_dataset(tmp_path / "d", "classify", rows=120).folder
    with Run(dataset, tmp_path, *TWO) as run:
        code, output = run.finish()
        assert (code, "error: rank 1 was ended by SIGABRT" in output) == (128 + signal.SIGABRT, True), output
        assert run.gone()


# name -> (parameters, fault, examples of a step)
DIVIDED = {
    "shards": (["parallel.zero=3"], "oom@8:rank1:over2", 8),
    # The last stage has the losses, of parts of a micro-batch.
    "stages": (["parallel.pp=2", "parallel.pipeline.microbatches=2"], "oom@8:rank1:over1", 4),
}


@pytest.mark.parametrize("name", ["shards", pytest.param("stages", marks=[pytest.mark.fault, pytest.mark.slow])])
def test_where_ranks_meet_inside_of_a_pass_the_job_starts_again_with_less(tmp_path, monkeypatch, name):
    divided, fault, block = DIVIDED[name]
    dataset = tiny_dataset(tmp_path / "d", "classify", rows=120)
    words = ["train.max_steps=12", "train.eval_every=12", "train.checkpoint_every=2", "model.layers=2", "model.dropout=0.0",
             "train.optimizer=sgd", "distill.enabled=false"]  # fmt: skip
    alone = load(None, [*WORDS, *words, f"train.batch_size={block}"])
    seed_all(alone.train.seed)
    whole = fit(alone, Classify(alone, dataset), models.build(alone.model, dataset.spec))
    monkeypatch.setenv(inject.VARIABLE, fault)
    with Run(dataset.folder, tmp_path, *TWO, *words, *divided) as run:
        code, output = run.finish()
        assert code == 0, output
        assert output.count("starting again from the newest checkpoint, with less") == 1, output
        assert "resuming from checkpoint step-" in output
        rows = [json.loads(line) for line in (run.out / "history.jsonl").read_text().splitlines()]
        (event,) = [row for row in rows if "event" in row]
        assert event["event"] == "started again with less memory: micro_batch=2"
        assert event["step"] > 0
        losses = [row["train_loss"] for row in rows if "train_loss" in row]
        assert losses == pytest.approx([row["train_loss"] for row in whole.history if "train_loss" in row], abs=1e-5)
        assert run.gone()
