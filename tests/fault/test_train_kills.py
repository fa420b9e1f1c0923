"""Killed training resumes to the same bits: SIGKILL and SIGTERM at steps drawn from fixed seeds, real processes.

Each child signals itself after a given step, from a hook that the test gives to `fit`: nothing depends on how fast the
machine is. Children come from a fork server that has imported torch already, so that many kills cost little.
"""

from __future__ import annotations

import json
import os
import random
import signal

import pytest

from tests.ranks import FORKS
from tests.tiny import tiny_dataset
from trainer.artifacts.dataset import Dataset

pytestmark = pytest.mark.fault

STEPS = 120
WORDS = [
    "train.threads=1", "train.batch_size=4", f"train.max_steps={STEPS}", "train.eval_every=50", "train.log_every=7",
    "train.checkpoint_every=10", "train.optimizer=muon", "train.lr=0.01", "train.early_stopping.patience=100",
    "model.name=encoder", "model.dim=32", "model.layers=1", "model.ff=32", "model.heads=2", "model.dropout=0.2",
]  # fmt: skip


def child(dataset: str, scratch: str | None, result: str, log: str, step: int, number: int, background: bool) -> None:
    """Train, send oneself a signal after a step, and write the history's bits and the weights' digest."""
    import hashlib
    from pathlib import Path

    from trainer import models, tasks
    from trainer.config.load import load
    from trainer.errors import Preempted
    from trainer.train import checkpoint
    from trainer.train.fit import fit
    from trainer.train.state import seed_all

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    checkpoint.SHARE = 1e9  # every checkpoint that may be written is: how long a save takes must not matter
    params = load(None, [*WORDS, f"train.checkpoint_async={background}".lower()])
    data = Dataset(dataset)
    seed_all(0)
    model = models.build(params.model, data.spec)

    def on_step(done: int, total: int, _model: object) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    try:
        place = Path(scratch) if scratch else None
        fitted = fit(params, tasks.build(params, data), model, scratch=place, on_step=on_step)
    except Preempted as error:
        os._exit(error.exit_code)
    digest = hashlib.sha256()
    for name, value in sorted(fitted.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    rows = [{k: float(v).hex() for k, v in row.items()} for row in fitted.history]
    Path(result).write_text(json.dumps([rows, fitted.best_step, fitted.metrics, digest.hexdigest()]))


def run(dataset, scratch, result, step=-1, number=signal.SIGKILL, background=True):
    """Exit status of a child, and what it said."""
    log = result.with_suffix(".log")
    place = str(scratch) if scratch else None
    arguments = (str(dataset), place, str(result), str(log), step, int(number), background)
    process = FORKS.Process(target=child, args=arguments)
    process.start()
    try:
        process.join(120)
        return process.exitcode, log.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=120).folder


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """What a run without checkpoints and without kills gives."""
    result = tmp_path_factory.mktemp("whole") / "result.json"
    assert run(dataset, None, result)[0] == 0
    return json.loads(result.read_text())


@pytest.mark.parametrize(
    ("number", "code", "seed", "background"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 1, False), (signal.SIGKILL, -signal.SIGKILL, 4, True),
        (signal.SIGTERM, 143, 2, True), (signal.SIGTERM, 143, 3, False),
    ],
)  # fmt: skip
def test_killed_at_random_steps_it_ends_with_the_same_bits(
    number, code, seed, background, dataset, undisturbed, tmp_path
):
    steps = sorted(random.Random(seed).sample(range(11, STEPS), 3))
    print(f"seed {seed}: steps {steps}")
    resumed = []
    for step in steps:
        status, said = run(dataset, tmp_path / "scratch", tmp_path / "killed.json", step, number, background)
        assert status == code, said
        resumed.append("resuming from checkpoint" in said)
    # A kill also loses what is being written in the background: how much that is depends on the machine.
    exact = number == signal.SIGTERM or not background
    assert resumed == [False, True, True] or not exact
    status, said = run(dataset, tmp_path / "scratch", tmp_path / "result.json")
    assert status == 0, said
    # SIGKILL loses the steps since the last checkpoint, SIGTERM none.
    last = steps[-1] if number == signal.SIGTERM else (steps[-1] - 1) // 10 * 10
    assert f"resuming from checkpoint step-{last:09d}" in said or not exact
    assert json.loads((tmp_path / "result.json").read_text()) == undisturbed
    assert not (tmp_path / "killed.json").exists()


def test_sigterm_in_the_first_step_leaves_a_checkpoint_of_it(dataset, undisturbed, tmp_path):
    assert run(dataset, tmp_path, tmp_path / "r.json", 1, signal.SIGTERM)[0] == 143
    assert [path.name for path in tmp_path.glob("train/step-*")] == ["step-000000001"]
    assert run(dataset, tmp_path, tmp_path / "r.json")[0] == 0
    assert json.loads((tmp_path / "r.json").read_text()) == undisturbed
