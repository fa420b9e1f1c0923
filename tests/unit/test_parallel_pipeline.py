"""Pipelines without processes: schedules are whole and short, parts make up the model, refusals say what fits."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

from trainer import models
from trainer.artifacts.dataset import Spec
from trainer.config.model import CNN, Decoder
from trainer.config.parallel import Parallel
from trainer.errors import ConfigError
from trainer.parallel.pipeline import copied, divide
from trainer.parallel.schedule import Work, num_parts, orders, spans, table
from trainer.train.staging import join, merge, split

SHAPES = [
    (name, ranks, each * ranks, parts)
    for name, ranks, each in [
        *product(("gpipe", "1f1b"), (2, 3, 4, 7), (1,)), *product(("interleaved",), (2, 3, 4), (2, 3, 5))
    ]
    for parts in ((1, 2, 5, 16) if each == 1 else (ranks, 2 * ranks, 5 * ranks))
]  # fmt: skip


def parallel(**values) -> Parallel:
    return Parallel(pp=values.pop("pp"), pipeline=values)


@pytest.mark.parametrize(("name", "ranks", "stages", "parts"), SHAPES)
def test_every_pass_is_made_once_by_its_rank_after_what_it_needs(name, ranks, stages, parts):
    when: dict[Work, int] = {}
    for time, slot in enumerate(table(name, ranks, stages, parts)):
        for rank, work in enumerate(slot):
            if work is not None:
                assert work not in when
                assert work.stage % ranks == rank
                assert all(when[need] < time for need in work.needs(stages - 1))
                when[work] = time
    assert len(when) == 2 * stages * parts


@pytest.mark.parametrize(("name", "ranks", "stages", "parts"), SHAPES)
def test_no_slot_is_lost(name, ranks, stages, parts):
    """As long as published: the work of a rank, and the way to the last rank and back."""
    assert len(table(name, ranks, stages, parts)) == 2 * (stages // ranks * parts + ranks - 1)


def kept(order: list[Work]) -> int:
    """The most micro-batches whose activations are kept at a time."""
    now = most = 0
    for work in order:
        now += -1 if work.backward else 1
        most = max(most, now)
    return most


def test_1f1b_keeps_as_many_micro_batches_as_there_are_ranks_to_come_gpipe_all():
    assert [kept(order) for order in orders("1f1b", 4, 4, 16)] == [4, 3, 2, 1]
    assert [kept(order) for order in orders("gpipe", 4, 4, 16)] == [16] * 4
    # Of half as many blocks each: 11 of these take less than 6 of 1F1B's.
    assert [kept(order) for order in orders("interleaved", 4, 8, 16)] == [11, 9, 7, 5]


@pytest.mark.parametrize(("stages", "parts"), [(2, 4), (6, 3), (8, 5)])
def test_an_evaluation_has_no_backward_passes(stages, parts):
    works = [work for slot in table("forward", 2, stages, parts) for work in slot if work]
    assert len(works) == stages * parts
    assert not any(work.backward for work in works)


def test_blocks_are_divided_evenly_and_the_last_stages_have_the_fewest():
    assert spans(parallel(pp=4), 10) == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert spans(parallel(pp=2, schedule="interleaved", stages=3), 7) == [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 5),
        (5, 6),
        (6, 7),
    ]
    assert spans(parallel(pp=2, schedule="1f1b", stages=3), 2) == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("values", "blocks", "message", "fix"),
    [
        ({"pp": 4}, 2, "parallel.pp: 4 stages, but the model has 2 blocks", "use parallel.pp=2, or model.layers=4 or more"),
        ({"pp": 2}, 1, "but the model has 1 block", "use parallel.pp=1, or model.layers=2 or more"),
        ({"pp": 4, "schedule": "interleaved"}, 6, "parallel.pp: 4 ranks with 2 stages each",
         "use parallel.pp=3 or parallel.pipeline.schedule=1f1b, or model.layers=8 or more"),
        ({"pp": 4, "schedule": "interleaved"}, 3, "has 3 blocks", "use parallel.pp=1, or model.layers=8 or more"),
    ],
)  # fmt: skip
def test_more_stages_than_blocks_are_refused_with_values_that_fit(values, blocks, message, fix):
    with pytest.raises(ConfigError) as caught:
        spans(parallel(**values), blocks)
    assert message in caught.value.message
    assert caught.value.hint == fix


def test_interleaved_micro_batches_come_in_groups_of_the_ranks():
    assert num_parts(parallel(pp=4, schedule="interleaved")) == 8
    assert num_parts(parallel(pp=4, microbatches=6)) == 6
    with pytest.raises(ConfigError) as caught:
        num_parts(parallel(pp=4, schedule="interleaved", microbatches=6))
    assert caught.value.message.startswith("parallel.pipeline.microbatches: 6 is no multiple of parallel.pp, 4")
    assert "parallel.pipeline.microbatches=8" in caught.value.hint


@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_of_a_model_have_its_names_and_only_tied_embeddings_twice(tied):
    config = Decoder(dim=24, layers=5, ff=16, tie_embeddings=tied, bigrams=8)
    whole = models.build(config, Spec("lm", vocab_size=30, max_length=8))
    names: list[str] = []
    for rank in range(2):
        part = copy.deepcopy(whole)
        divide(part, "decoder", parallel(pp=2, schedule="interleaved"), rank)
        names += set(part.state_dict()) - set(copied(part, rank))
        assert copied(part, rank) == (["embedding.weight"] if tied and rank else [])
    assert sorted(names) == sorted(whole.state_dict())


def test_a_model_whose_layers_differ_is_refused_by_name():
    model = models.build(CNN(width=4), Spec("image", num_labels=3, image_size=8, image_channels=1))
    with pytest.raises(ConfigError, match=r"parallel\.pp: 2, but model\.name=cnn") as caught:
        divide(model, "cnn", parallel(pp=2), 0)
    assert "parallel.pp=1" in caught.value.hint


def test_the_trees_of_ranks_with_different_parts_become_one_and_each_takes_its_own():
    ones, twos = torch.tensor(1.0), torch.tensor(2.0)
    trees = [
        {
            "model": {"a": ones},
            "optimizer": {"a": {"step": 3, "moment": ones}},
            "progress": {"step": 3, "rows": [1, 2]},
        },
        {
            "model": {"b": twos},
            "optimizer": {"b": {"step": 3, "moment": twos}},
            "progress": {"step": 3, "rows": [1, 2]},
        },
    ]
    divided = [split(tree) for tree in trees]
    merged = merge([plain for plain, _ in divided])
    everything = {name: None for _, tensors in divided for name in tensors}
    for tree, (_, tensors) in zip(trees, divided, strict=True):
        found = join(merged, everything | tensors)
        assert found["model"] == tree["model"]
        assert found["progress"] == tree["progress"]
        for name, state in tree["optimizer"].items():
            assert found["optimizer"][name] == state
