"""Checkpoints written in the background: what is saved is the state at its step, and errors come back to training."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from trainer.errors import StorageError
from trainer.parallel.group import Ranks
from trainer.train import checkpoint, writing
from trainer.train.checkpoint import Checkpoints
from trainer.train.staging import Staging, join, split


def tree(step: int) -> dict:
    return {"model": {"w": torch.full((500, 30), float(step))}, "progress": {"step": step, "rows": [{"loss": 1.0}]}}


def checkpoints(folder, **given) -> Checkpoints:
    return Checkpoints(folder, given.pop("keep", 3), Ranks(), "run", **given)


@pytest.fixture
def gate(monkeypatch):
    """The background thread waits for this before it writes."""
    opened = threading.Event()
    real = writing.Writing._write_share

    def wait(self, rank):
        assert opened.wait(30)
        return real(self, rank)

    monkeypatch.setattr(writing.Writing, "_write_share", wait)
    return opened


def test_what_is_saved_is_the_state_at_its_step_though_training_goes_on(tmp_path, gate):
    state = tree(10)
    with checkpoints(tmp_path) as kept:
        kept.save(10, state, {"seed": 1})
        state["model"]["w"].mul_(-1.0)
        state["progress"]["step"] = 11
        state["progress"]["rows"][0]["loss"] = 2.0
        gate.set()
    found, rng = checkpoints(tmp_path).load()
    assert torch.equal(found["model"]["w"], torch.full((500, 30), 10.0))
    assert found["progress"] == {"step": 10, "rows": [{"loss": 1.0}]}
    assert rng == {"seed": 1}


def test_a_periodic_save_is_left_out_while_one_is_being_written_and_a_durable_one_waits(tmp_path, gate):
    with checkpoints(tmp_path) as kept:
        kept.save(10, tree(10), {})
        assert not kept.due()
        kept.save(20, tree(20), {})
        threading.Timer(0.1, gate.set).start()
        kept.save(30, tree(30), {}, durable=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000030"]


def test_a_durable_save_of_a_step_that_is_being_written_waits_for_it(tmp_path, gate):
    with checkpoints(tmp_path) as kept:
        kept.save(10, tree(10), {})
        threading.Timer(0.1, gate.set).start()
        kept.save(10, tree(10), {}, durable=True)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_in_the_background_is_raised_at_the_next_step_and_leaves_the_older_ones(tmp_path, monkeypatch):
    with checkpoints(tmp_path) as kept:
        kept.save(10, tree(10), {}, durable=True)

        def refuse(path):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(writing.manifest, "make_durable", refuse)
        state = tree(20)
        kept.save(20, state, {})
        wait_for(lambda: kept.failed)
        with pytest.raises(StorageError, match=r"step 20: .*No space left") as caught:
            kept.settle()
        assert "free some space" in caught.value.hint
        assert not kept.failed
        assert torch.equal(state["model"]["w"], tree(20)["model"]["w"])
        assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]
        monkeypatch.undo()
        kept.save(20, state, {}, durable=True)
    assert checkpoints(tmp_path).load()[0]["progress"]["step"] == 20


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_durable_save_raises_its_own_error(asynchronous, tmp_path):
    (tmp_path / "file").write_text("a file where a folder is needed")
    with checkpoints(tmp_path / "file", asynchronous=asynchronous) as kept, pytest.raises(StorageError):
        kept.save(10, tree(10), {}, durable=True)


def test_synchronous_saves_are_on_the_disk_when_they_return(tmp_path):
    with checkpoints(tmp_path, asynchronous=False) as kept:
        kept.save(10, tree(10), {})
        assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]
    assert checkpoints(tmp_path).load()[0]["progress"]["step"] == 10


def test_a_bug_in_the_background_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.Writing, "_write_share", lambda self, rank: 1 / 0)
    with checkpoints(tmp_path) as kept, pytest.raises(StorageError, match="ZeroDivisionError"):
        kept.save(10, tree(10), {}, durable=True)


def test_an_error_of_training_does_not_wait_long_for_the_background(tmp_path, gate, monkeypatch):
    monkeypatch.setattr("trainer.train.checkpoint.GRACE_S", 0.1)
    kept = checkpoints(tmp_path)
    kept.save(10, tree(10), {})
    kept.__exit__(KeyError, KeyError(), None)
    gate.set()


def test_buffers_are_kept_from_save_to_save_and_made_anew_for_other_shapes():
    staging = Staging()
    first = staging.copy({"a": torch.ones(4), "b": torch.zeros(2, dtype=torch.int64)})
    again = staging.copy({"a": torch.full((4,), 2.0), "b": torch.ones(2, dtype=torch.int64)})
    assert first["a"] is again["a"]
    assert again["a"].tolist() == [2.0] * 4
    assert again["b"].tolist() == [1, 1]
    assert staging.copy({"a": torch.ones(5)})["a"].shape == (5,)


def test_tensors_that_are_not_contiguous_or_empty_are_copied_as_they_are():
    given = {
        "t": torch.arange(6.0).reshape(2, 3).T,
        "e": torch.empty(0, 3),
        "s": torch.tensor(5),
        "h": torch.ones(3).bfloat16(),
    }
    for name, copy in Staging().copy(given).items():
        assert torch.equal(copy, given[name])
        assert copy.dtype == given[name].dtype


def test_a_tree_is_the_same_after_split_and_join_without_what_was_left_out():
    given = {"a": [torch.ones(1), {"b": (1, None)}], 3: {"x": torch.zeros(2), "y": "text"}}
    plain, tensors = split(given)
    assert set(tensors) == {"/a/0", "/3/x"}
    whole = join(plain, tensors)
    assert whole[3]["y"] == "text"
    assert whole["a"][1] == {"b": (1, None)}
    assert join(plain, tensors | {"/3/x": None})[3] == {"y": "text"}
    del tensors["/3/x"]
    with pytest.raises(KeyError):
        join(plain, tensors)


def test_a_save_too_slow_for_a_preemption_is_told_once_with_its_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PROMISED_S", 0.0)
    with checkpoints(tmp_path) as kept:
        for step in (10, 20):
            kept.save(step, tree(step), {}, durable=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert "checkpoint of step 10 took 0." in line
