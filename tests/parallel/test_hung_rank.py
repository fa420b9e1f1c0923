"""A rank that stops without ending: the error names it, and another attempt may do better."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.parallel.test_train_ranks import DEADLINE, TWO, Run
from tests.tiny import tiny_dataset
from trainer.parallel import arrivals, launch
from trainer.parallel.arrivals import Arrivals, Unanswered
from trainer.train import worker

pytestmark = pytest.mark.parallel

TIMEOUT_S = 15


def hang(run: Run, rank: int) -> None:
    """Stop a rank until the other one has given up waiting for it; then end it, as torchrun does 30 s later."""
    process = run.ranks()[rank]
    os.kill(process.pid, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE
    while not list(run.scratch.glob(f"*/ranks/{launch.ERRORS}/rank-{1 - rank:04d}.json")):
        assert run.process.poll() is None, run.finish()[1]
        assert time.monotonic() < end, "the other rank waits on"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.fault
@pytest.mark.slow
def test_a_hung_rank_is_named_and_a_restart_goes_on(tmp_path: Path) -> None:
    """Rank 1 hangs and the restarted ranks go on; then rank 0 hangs, and it alone is named."""
    dataset = tiny_dataset(tmp_path / "d", "classify", rows=120).folder
    words = [*TWO, f"parallel.timeout_s={TIMEOUT_S}", "parallel.max_restarts=1", "train.max_steps=100000"]
    with Run(dataset, tmp_path, *words) as run:
        run.wait_for_checkpoint()
        hang(run, 1)
        run.wait_for_checkpoint(run.newest())
        hang(run, 0)
        code, output = run.finish()
        assert (code, "error: rank 0 hung" in output, "rank 1 hung" in output) == (137, True, False), output
        assert f"took longer than {TIMEOUT_S} s" in output
        assert "parallel.timeout_s" in output.split("fix:")[1]
        assert "Traceback" not in output
        assert run.gone()


@pytest.mark.parametrize(
    ("last", "said"), [([1], "it waited for rank 1"), ([1, 3], "rank 1 and rank 3"), ([0], ""), ([], "")]
)
def test_the_first_rank_that_waits_says_for_whom(tmp_path, monkeypatch, capsys, last, said) -> None:
    """Before the launcher does, which hears of it when torchrun has ended the others."""

    def train(place: Path, rank: int) -> None:
        raise Unanswered(f"rank {rank}: a collective took longer than 5 s", "look", last)

    (tmp_path / launch.ERRORS).mkdir()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(worker, "die_with", lambda parent: None)
    monkeypatch.setattr(worker, "train", train)
    assert worker.main(tmp_path) == 137
    assert launch.read_errors(tmp_path)[0]["last"] == last
    error = capsys.readouterr().err
    assert (said in error) if said else not error


def waited(place: Path, rank: int, last: list[int]) -> None:
    launch.write_error(place, rank, Unanswered(f"rank {rank}: a collective took longer than 5 s", "look", last))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of a launch of four ranks."""
    (tmp_path / launch.ERRORS).mkdir()
    (tmp_path / launch.SPEC).write_text(json.dumps({"params": {"train": {"processes": 4}}}))
    return tmp_path


def test_stopped_inside_a_collective_it_is_the_one_that_says_nothing(place: Path) -> None:
    """All ranks had come to it: only what they wrote, or did not write, tells them apart."""
    waited(place, 0, [])
    waited(place, 3, [])
    launch.write_error(place, 1, RuntimeError("Connection closed by peer"))
    found = launch.explain(place, 1, False)
    assert found.message.startswith("rank 2 hung")
    assert (found.exit_code, found.hint) == (137, "look")


def test_a_rank_that_waited_itself_is_not_named_for_being_behind(place: Path) -> None:
    waited(place, 0, [1, 2, 3])
    waited(place, 3, [])
    assert launch.explain(place, 1, False).message.startswith("rank 1 and rank 2 hung")


def test_a_rank_that_came_too_late_is_named_although_it_wrote_an_error(place: Path) -> None:
    waited(place, 0, [1])
    launch.write_error(place, 1, RuntimeError("Connection closed by peer"))
    assert launch.explain(place, 1, False).message.startswith("rank 1 hung")


def test_if_all_waited_no_rank_is_accused(place: Path) -> None:
    for rank in range(4):
        waited(place, rank, [])
    assert launch.explain(place, 1, False).message.startswith("no rank is known to have stopped")


def test_the_last_to_arrive_are_those_with_the_fewest_collectives_of_this_attempt(tmp_path: Path) -> None:
    path = tmp_path / "arrivals"
    arrivals.create(path, 3)
    ranks = [Arrivals(path, rank, 0) for rank in range(3)]
    assert ranks[0].last() == []
    for rank in (0, 0, 1, 1, 2):
        ranks[rank].come()
    assert ranks[0].last() == ranks[2].last() == [2]
    # Restarted, rank 1 has not come as far as to say so: what it counted before is not taken for this attempt's.
    for rank in (0, 2):
        Arrivals(path, rank, 1).come()
    assert ranks[0].last() == [1]


def test_every_collective_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from trainer.parallel.group import current, process_group

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    path, cpu, model = tmp_path / "arrivals", torch.device("cpu"), torch.nn.BatchNorm1d(2)
    arrivals.create(path, 1)
    with process_group("auto", 10.0, cpu, path):
        ranks = current(cpu)
        for collective in (
            lambda: ranks.sum(torch.ones(2)),
            lambda: ranks.sum_gradients(model.parameters()),
            lambda: ranks.same_parameters(model),
            lambda: ranks.same_buffers(model),
            lambda: ranks.gather(1),
            lambda: ranks.from_first(1),
            lambda: ranks.barrier(),
        ):
            before = int.from_bytes(path.read_bytes(), "little")
            collective()
            assert int.from_bytes(path.read_bytes(), "little") > before
