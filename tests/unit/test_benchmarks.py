"""What benchmarks share: contenders make their steps in turn, with the same shapes, and what is missing is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from benchmarks.peers import gpts
from trainer.config.load import load

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = gpts.Shape(layers=1, width=16, heads=2, length=8, batch=2, ff=40, vocab=64)
WORDS = ["task.name=lm", "model.name=decoder", "distill.enabled=false", "train.device=cpu", "train.max_steps=6"]


def test_a_loop_in_turns_goes_from_pause_to_pause_and_hands_on_what_it_raises():
    seen = []

    def loop(pause):
        for number in range(2):
            seen.append(number)
            pause()
        raise ValueError("the third")

    step = gpts.in_turns(loop)
    assert seen == []
    step()
    assert seen == [0]
    step()
    assert seen == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        step()


def counter() -> gpts.Contender:
    """One that ends its process with the third step."""
    left = iter([os.getpid(), 1])
    return os.getpid(), lambda: next(left) and None


def missing() -> gpts.Contender:
    raise ImportError("no transformers")


def test_a_contender_apart_has_a_process_of_its_own_and_steps_when_asked():
    process, step = gpts.apart(counter)
    assert process != os.getpid()
    step()
    step()
    with pytest.raises(EOFError):
        step()
    with pytest.raises(ImportError, match="no transformers"):
        gpts.apart(missing)


def test_in_a_race_all_make_their_steps_in_turn_and_only_ours_has_our_settings():
    made = []

    def step():
        with gpts.stock(1):
            made.append(torch.are_deterministic_algorithms_enabled())

    params = load(None, [*WORDS, *TINY.words()])
    with gpts.stock(1):
        taken = gpts.race(params, TINY, "cpu", {"other": (4016, step)})
    assert made == [False] * 6
    assert {name: len(seconds) for name, seconds in taken.items()} == {"ours": 3, "other": 3}
    assert all(second > 0 for seconds in taken.values() for second in seconds)


def test_a_race_refuses_a_contender_of_another_size():
    with pytest.raises(ValueError, match="other has 9,000 parameters, ours 4,"):
        gpts.race(load(None, [*WORDS, *TINY.words()]), TINY, "cpu", {"other": (9000, lambda: None)})


def test_the_table_has_minimum_median_and_maximum_of_speeds_and_of_ratios():
    ours, other = gpts.table(
        {"ours": [1.0, 2.0, 4.0], "other": [2.0, 3.0, 16.0]}, 12, lambda speed: f" {speed:g}"
    ).splitlines()[1:]
    assert ours.split() == ["ours", "3", "6", "12", "1.00", "1.00", "1.00", "6"]
    assert other.split() == ["other", "1", "4", "6", "1.50", "2.00", "4.00", "4"]


def test_without_a_gpu_its_benchmark_says_so_and_gives_no_number():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, ROOT / "benchmarks/gpu.py"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "not measured: torch sees no GPU here\n")


def test_the_bare_loop_makes_the_same_steps_as_ours():
    ours, bare, apart = overhead.measure(4, 1)
    assert len(ours) == len(bare) == 4
    assert apart < 1e-6
