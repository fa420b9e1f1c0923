"""Copies of checkpoints at a URI: a folder, and S3 as moto's server has it."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch

from tests import s3
from trainer import storage
from trainer.errors import StorageError
from trainer.parallel.group import Ranks
from trainer.train.checkpoint import Checkpoints
from trainer.train.inventory import listing
from trainer.train.remote import Store


@pytest.fixture(scope="module")
def bucket():
    with s3.bucket("checkpoints") as uri:
        yield uri


@pytest.fixture(params=["s3", "file"])
def uri(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def tree(step: int) -> dict:
    return {"w": torch.full((500,), float(step)), "step": step}


def checkpoints(folder, uri, **given) -> Checkpoints:
    return Checkpoints(folder / "train", 2, Ranks(), given.pop("identity", "run"), store=uri, **given)


def save(folder, uri, *steps, best=()) -> None:
    with checkpoints(folder, uri) as kept:
        for step in steps:
            kept.save(step, tree(step), {"step": step}, durable=True, best=step in best)
            if kept.store:
                kept.store.wait()


def test_copies_are_kept_like_the_originals_and_a_run_without_any_takes_the_newest(uri, tmp_path, capsys):
    save(tmp_path / "a", uri, 10, 20, 30, 40, best=(20,))
    assert Store(f"{uri}/train-run", "run", 2, True).names() == [f"step-{step:09d}" for step in (40, 30, 20)]
    assert [(entry.step, entry.state, entry.best) for entry in listing(uri)] == [
        (20, "complete", True), (30, "complete", False), (40, "complete", False),
    ]  # fmt: skip
    with checkpoints(tmp_path / "b", uri) as kept:
        found, rng = kept.load()
    assert torch.equal(found["w"], tree(40)["w"])
    assert rng == {"step": 40}
    assert f"step-000000040 was taken from {uri}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "b/train").iterdir()] == ["step-000000040"]


def test_the_newest_wins_wherever_it_is(uri, tmp_path):
    save(tmp_path / "a", uri, 10)
    save(tmp_path / "b", "", 20)
    with checkpoints(tmp_path / "b", uri) as kept:
        assert kept.load()[0]["step"] == 20
    save(tmp_path / "a", uri, 30)
    with checkpoints(tmp_path / "b", uri) as kept:
        assert kept.load()[0]["step"] == 30


def test_a_damaged_copy_is_passed_over_and_one_without_a_manifest_is_not_there(uri, tmp_path, capsys):
    save(tmp_path / "a", uri, 10, 20)
    save(tmp_path / "a", uri, 30)
    fs, path = storage.filesystem(f"{uri}/train-run")
    fs.pipe_file(f"{path}/step-000000030/state.json", b"{}")
    fs.makedirs(f"{path}/step-000000040", exist_ok=True)
    fs.pipe_file(f"{path}/step-000000040/state.json", b"{}")
    with checkpoints(tmp_path / "b", uri) as kept:
        assert kept.load()[0]["step"] == 20
    assert "step-000000030 passed over" in capsys.readouterr().out


def test_another_run_has_copies_of_its_own(uri, tmp_path):
    save(tmp_path / "a", uri, 10)
    with checkpoints(tmp_path / "b", uri, identity="other") as kept:
        assert kept.load() is None


def test_a_store_that_refuses_ends_no_run_and_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("a file where a folder is needed")
    uri = f"file://{tmp_path}/file"
    with checkpoints(tmp_path / "a", "") as kept:
        kept.save(10, tree(10), {}, durable=True)
    save(tmp_path / "a", uri, 20)
    assert f"step-000000020 was not copied to {uri}" in capsys.readouterr().out
    assert (tmp_path / "a/train/step-000000020").is_dir()


def test_a_store_that_does_not_answer_is_no_reason_to_begin_anew(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise StorageError("no connection", "check the network")

    monkeypatch.setattr(Store, "names", refuse)
    with checkpoints(tmp_path / "a", f"file://{tmp_path}/store") as kept, pytest.raises(StorageError):
        kept.load()
    save(tmp_path / "a", "", 10)
    with checkpoints(tmp_path / "a", f"file://{tmp_path}/store") as kept:
        assert kept.load()[0]["step"] == 10
    assert "only those of this machine" in capsys.readouterr().out


def test_what_is_being_copied_is_not_removed_here(tmp_path, monkeypatch):
    gate, copying = threading.Event(), threading.Event()
    real = Store.send

    def slow(self, place):
        copying.set()
        assert gate.wait(30)
        real(self, place)

    monkeypatch.setattr(Store, "send", slow)
    uri = f"file://{tmp_path}/store"
    monkeypatch.setattr("trainer.train.checkpoint.STORE_GRACE_S", 0.0)
    with checkpoints(tmp_path / "a", uri) as kept:
        kept.save(10, tree(10), {}, durable=True)
        assert copying.wait(30)
        for step in (20, 30, 40):
            kept.save(step, tree(step), {}, durable=True)
        assert (tmp_path / "a/train/step-000000010").is_dir()
        gate.set()
    assert [entry.step for entry in listing(uri)] == [10, 40]
    shutil.rmtree(tmp_path / "store")
