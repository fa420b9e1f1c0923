"""Pipelines of two and four ranks: the losses, gradients and metrics of one process, whatever the schedule.

All cases, and the trainings under plans with pipelines, run in one start of four ranks.
"""

from __future__ import annotations

import copy
import json
import os
import traceback
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests import plan_cases
from tests.plan_cases import Case, numbers, run_cases
from tests.tiny import tiny_dataset

pytestmark = pytest.mark.parallel

RANKS = 4
FAMILIES = {
    "decoder": ("lm", ["model.dim=24", "model.ff=16", "model.tie_embeddings=true"]),
    "untied": ("lm", ["model.name=decoder", "model.dim=24", "model.ff=16", "model.tie_embeddings=false"]),
    "encoder": ("classify", ["model.dim=16", "model.ff=16", "model.heads=2"]),
    "vit": ("image", ["model.dim=16", "model.ff=16", "model.heads=2"]),
}
# name -> family, ranks, blocks, schedule, micro-batches, rows of the batches
CASES = {
    "gpipe of two": ("decoder", 2, 2, "gpipe", 0, [8, 8, 7]),
    "gpipe of four": ("encoder", 4, 5, "gpipe", 3, [8, 7, 2]),
    "1f1b of two": ("encoder", 2, 3, "1f1b", 1, [8, 5, 1]),
    "1f1b of four": ("decoder", 4, 4, "1f1b", 0, [16, 9, 3]),
    "1f1b of pictures": ("vit", 4, 5, "1f1b", 6, [8, 7, 6]),
    "interleaved of two": ("vit", 2, 4, "interleaved", 0, [8, 8, 3]),
    "interleaved of four": ("decoder", 4, 9, "interleaved", 8, [8, 8, 5]),
    "interleaved, three stages a rank": ("encoder", 2, 7, "interleaved", 2, [8, 7, 4]),
    "untied": ("untied", 2, 2, "1f1b", 4, [8, 8, 5]),
}

INTERLEAVED = "parallel.pipeline.schedule=interleaved"
SEQUENCE = ("parallel.tp=2", "parallel.sequence_parallel=true")
FOUR = "model.layers=4"
# name -> ranks, parameters beside parallel.pp=2; of a decoder with four blocks
PLANS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (4, ()),
    "zero1, interleaved, accumulated": (4, ("parallel.zero=1", INTERLEAVED, "train.accumulation=2")),
    "zero2": (4, ("parallel.zero=2", "parallel.pipeline.schedule=gpipe")),
    "zero3, interleaved": (4, ("parallel.zero=3", INTERLEAVED)),
    "tp, interleaved": (4, (*SEQUENCE, INTERLEAVED)),
}
KEPT = ("train.checkpoint_every=5", FOUR)
PIPE = "parallel.pp=2"
# Saved under the first plan, gone on with under the others: name -> ranks, batch, parameters
SAVED = {"pipeline": (4, 4, (PIPE, "parallel.zero=3")), "alone": (1, 8, ())}
RESUMES = {
    "pipeline": {"alone": (1, ()), "interleaved": (2, (PIPE, INTERLEAVED))},
    "alone": {"pipeline": (4, (PIPE, "parallel.zero=2"))},
}


def trainings() -> list[Case]:
    """Those of this file, by name."""
    made = [Case("one", 1, (FOUR,))]
    made += [Case(name, ranks, (PIPE, *words, FOUR)) for name, (ranks, words) in PLANS.items()]
    for name, (ranks, batch, words) in SAVED.items():
        made.append(Case(f"{name}-killed", ranks, (*words, *KEPT), scratch=name, stop=8, batch=batch))
        made += [
            Case(f"{name}-{other}", fewer, (*changed, *KEPT), scratch=f"{name}-{other}", source=name, batch=batch)
            for other, (fewer, changed) in RESUMES[name].items()
        ]
    words = (PIPE, "model.dropout=0.2", "train.optimizer=adamw", *KEPT)
    made.append(Case("straight", 2, words))
    made.append(Case("preempted", 2, words, scratch="bits", term=8))
    made.append(Case("resumed", 2, words, scratch="bits"))
    words = ("train.early_stopping.patience=1", "train.early_stopping.threshold=9", "train.eval_every=2")
    return [*made, Case("stopping", 2, (PIPE, *words, FOUR))]


def params_of(family, *overrides):
    from trainer.config.load import load

    task, words = FAMILIES[family]
    name = [] if family == "untied" else [f"model.name={family}"]
    return load(
        None,
        [
            f"task.name={task}",
            "distill.enabled=false",
            *name,
            *words,
            "model.dropout=0.0",
            "train.label_smoothing=0.1",
            *overrides,
        ],
    )


class Piped:
    """A model, its part on this rank, its pipeline and its batches."""

    def __init__(self, data, family, ranks, layers, schedule, parts, rows, groups):
        import torch
        import torch.distributed as dist

        from trainer import models, tasks
        from trainer.artifacts.dataset import Dataset
        from trainer.parallel.pipeline import Pipeline, divide

        words = [f"model.layers={layers}", f"parallel.pp={ranks}", f"parallel.pipeline.schedule={schedule}"]
        stages = 3 if layers == 7 else 2
        words += [f"parallel.pipeline.microbatches={parts}", f"parallel.pipeline.stages={stages}"]
        self.params = params_of(family, *words)
        self.dataset = Dataset(Path(data) / self.params.task.name)
        self.task = tasks.build(self.params, self.dataset)
        torch.manual_seed(3)
        self.whole = models.build(self.params.model, self.dataset.spec)
        self.part = copy.deepcopy(self.whole)
        self.place = dist.get_rank() % ranks
        mine = divide(self.part, self.params.model.name, self.params.parallel, self.place)
        self.pipeline = Pipeline(self.part, mine, groups[ranks], self.params.parallel)
        ends = np.cumsum([0, *rows])
        self.batches = [self.task.batch("train", np.arange(i, j)) for i, j in pairwise(ends)]

    def losses(self, model, batch):
        import torch

        return torch.stack(list(self.task.losses(model, batch).values())).sum()

    def same(self, ours, theirs):
        """Whether the parts' values (gradients, weights) are the whole's; the last rank's copies too."""
        import torch

        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def trains_as_one_process(case):
    """Losses to 5 digits and gradients to 1e-5 over steps of batches of different sizes; tied weights stay equal."""
    import torch

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (case.whole, case.part)]
    finished = 0

    def finish():
        nonlocal finished
        finished += 1

    for step, batch in enumerate(case.batches):
        for optimizer in optimizers:
            optimizer.zero_grad()
        units = case.task.units(batch)
        expected = case.losses(case.whole, batch)
        (expected / units).backward()
        terms = case.pipeline.backward(case.task, batch, 1 / units, finish)
        case.pipeline.sum_copies()
        assert finished == step + 1
        if case.place == case.pipeline.ranks - 1:
            assert {name: term.dtype for name, term in terms.items()} == {"cross_entropy": torch.float64}
            assert terms["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
        else:
            assert terms == {}
        grads = [{n: p.grad for n, p in model.named_parameters()} for model in (case.part, case.whole)]
        case.same(*grads)
        for optimizer in optimizers:
            optimizer.step()
    case.same(case.part.state_dict(), case.whole.state_dict())
    bits_of_copies(case)


def bits_of_copies(case):
    import torch.distributed as dist

    from trainer.parallel.pipeline import copied

    found = [None] * case.pipeline.ranks
    own = {name: value.numpy().tobytes() for name, value in case.part.state_dict().items()}
    dist.all_gather_object(found, (own, copied(case.part, case.place)), group=case.pipeline.group)
    names = [name for part, _ in found for name in part]
    twice = {name for name in names if names.count(name) > 1}
    assert set(names) == set(case.whole.state_dict())
    assert [copies for _, copies in found] == [[]] * (len(found) - 1) + [sorted(twice)]
    assert all(found[0][0][name] == found[-1][0][name] for name in twice)
    assert bool(twice) == (case.params.model.name == "decoder" and case.params.model.tie_embeddings)


def tallies_as_one_process(case):
    """The last rank has the tally of the whole batch; evaluation leaves no gradients and no graph behind."""
    import torch

    from trainer.tasks.base import evaluating

    for batch in case.batches:
        with evaluating(case.whole):
            expected = case.task.tally(case.whole(batch["inputs"]).float(), batch)
        tally = case.pipeline.tally(case.task, batch)
        if case.place == case.pipeline.ranks - 1:
            torch.testing.assert_close(tally, expected.cpu(), rtol=1e-5, atol=1e-5)
        else:
            assert tally.numel() == 0


def has_an_empty_batch(case):
    """A rank's share of an epoch's last step may be empty: gradients of zero, on every parameter."""
    case.part.zero_grad()
    empty = {name: value[:0] for name, value in case.batches[0].items()}
    case.pipeline.backward(case.task, empty, 1.0)
    assert all(p.grad is not None and not p.grad.any() for p in case.part.parameters())


def in_bf16(case):
    """Autocast is made in each stage's forward pass."""
    import torch

    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    case.pipeline.context = autocast
    for model in (case.part, case.whole):
        model.zero_grad()
    batch = case.batches[0]
    with autocast():
        expected = case.losses(case.whole, batch)
    expected.backward()
    case.pipeline.backward(case.task, batch, 1.0)
    case.pipeline.sum_copies()
    seen = dict(case.whole.named_parameters())
    for name, parameter in case.part.named_parameters():
        wanted = seen[name].grad
        assert (parameter.grad - wanted).norm() <= 0.03 * wanted.norm(), name


def main(folder):
    """One rank: run all cases and write what became of them; then the trainings."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=20))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    outcomes = {}
    for name, values in CASES.items():
        case = Piped(folder / "pieces", *values, groups)
        for check in CHECKS:
            try:
                check(case)
                outcomes[f"{name}: {check.__name__}"] = ""
            except Exception:
                # The other ranks wait for this one: that ends them.
                outcomes[f"{name}: {check.__name__}"] = traceback.format_exc()
                (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
                raise
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
    plan_cases.main(folder)


CHECKS = (trains_as_one_process, tallies_as_one_process, has_an_empty_batch, in_bf16)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank says of each case, and what became of the trainings (empty if the cases have failed)."""
    folder = tmp_path_factory.mktemp("pipeline")
    for task in ("lm", "classify", "image"):
        tiny_dataset(folder / "pieces" / task, task, rows=160, max_length=24)
    try:
        results = run_cases(folder, trainings(), work=main)
    except AssertionError:
        if not any("Traceback" in path.read_text() for path in folder.glob("outcomes-*.json")):
            raise
        results = {}
    return [json.loads(path.read_text()) for path in sorted(folder.glob("outcomes-*.json"))], results


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline(found, case, check):
    for rank, outcome in enumerate(found[0]):
        assert outcome.get(f"{case}: {check.__name__}", "did not get there") == "", f"rank {rank}"


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_with_pipelines_learns_as_one_process(found, name):
    ours, one = found[1][name], found[1]["one"]
    plan_cases.assert_equal(ours, one)
    plan_cases.assert_same_statistics(ours, one)


@pytest.mark.parametrize(("name", "other"), [(name, other) for name in SAVED for other in RESUMES[name]])
def test_a_checkpoint_does_not_depend_on_the_stages(found, name, other):
    result = found[1][f"{name}-{other}"]
    assert result["resumed"] == 5
    assert numbers(result) == pytest.approx(numbers(found[1]["one"]), rel=1e-6)


def test_told_to_end_on_one_rank_a_pipeline_saves_and_goes_on_with_the_same_bits(found):
    straight, resumed = found[1]["straight"], found[1]["resumed"]
    assert "SIGTERM at step 8" in found[1]["preempted"]["error"]
    assert resumed["resumed"] == 8
    for what in ("losses", "norms", "evaluations", "weights"):
        assert resumed[what] == straight[what], what


def test_a_pipeline_stops_early(found):
    """All of its ranks have the same metrics: one that went on alone would wait for the others."""
    assert numbers(found[1]["stopping"]) == pytest.approx(numbers(found[1]["one"])[:4], rel=5e-6)
    assert len(found[1]["stopping"]["evaluations"]) == 2
