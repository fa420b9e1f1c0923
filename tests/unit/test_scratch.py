"""Scratch folders: who may enter them, and what is left."""

import errno
import fcntl
import os
import tempfile

import pytest

from trainer import scratch
from trainer.errors import StorageError


def test_scratch_for_remote_outputs_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = scratch._beside("s3://bucket/out")
    assert str(os.getuid()) in place.name
    assert place.stat().st_mode & 0o777 == 0o700
    assert scratch._beside("s3://bucket/out") == place
    place.chmod(0o777)
    with pytest.raises(StorageError, match="belongs to this user alone"):
        scratch._beside("s3://bucket/out")
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(StorageError, match="belongs to this user alone"):
        scratch._beside("s3://bucket/out")
    place.unlink()
    place.mkdir(0o700)
    found = place.lstat()
    if os.geteuid() == 0:
        os.chown(place, found.st_uid + 1, -1)
        with pytest.raises(StorageError, match="belongs to this user alone"):
            scratch._beside("s3://bucket/out")


def test_a_folder_made_anew_is_anothers(tmp_path):
    """Whoever waited must not go on in a folder that is gone, and whoever ends must not remove the next one's."""
    output, name = str(tmp_path / "out"), "0" * 12
    with scratch.held("train", name, output) as folder:
        (folder / "checkpoint").write_text("of the first")
        first = os.open(folder / "lock", os.O_RDONLY)
        scratch._discard(folder)
        with scratch.held("train", name, output) as again:
            assert again == folder
            assert list(again.iterdir()) == [again / "lock"]
            assert not scratch._is(first, again)
            (again / "checkpoint").write_text("of the second")
            os.close(first)
            assert scratch._try_lock(again, os.O_RDWR) == (None, True)
        assert not folder.exists()


def test_a_run_that_fails_leaves_the_next_ones_folder_alone(tmp_path):
    output, name = str(tmp_path / "out"), "0" * 12
    first = scratch.held("train", name, output)
    folder = first.__enter__()
    scratch._discard(folder)
    with scratch.held("train", name, output) as second:
        assert not first.__exit__(RuntimeError, RuntimeError("ended"), None)
        assert second.is_dir()
        assert scratch._try_lock(second, os.O_RDWR) == (None, True)


def test_where_nothing_can_be_locked_a_run_goes_on_and_sweeps_nothing(tmp_path, monkeypatch):
    def refused(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    old = tmp_path / ".scratch" / f"train-{'1' * 12}"
    old.mkdir(parents=True)
    (old / "lock").touch()
    (old / "checkpoint").write_text("x")
    os.utime(old, (0, 0))
    monkeypatch.setattr(fcntl, "flock", refused)
    with scratch.held("train", "0" * 12, str(tmp_path / "out")) as folder:
        assert folder.is_dir()
    assert not folder.exists()
    assert (old / "checkpoint").exists()


@pytest.mark.parametrize("content", [False, True])
def test_after_a_failure_the_folder_stays_unless_it_is_empty(tmp_path, content):
    def failing():
        with scratch.held("train", "0" * 12, str(tmp_path / "out")) as folder:
            if content:
                (folder / "checkpoint").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert (tmp_path / ".scratch").exists() == content


def test_a_scratch_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), scratch.held("train", "0" * 12, "out", str(tmp_path / "file")):
        pass


@pytest.mark.parametrize("name", ["MILLRACE_NODES", "PET_NNODES"])
def test_a_pod_waits_for_the_lock_of_a_machine_that_was_lost(name, monkeypatch):
    for each in ("MILLRACE_NODES", "PET_NNODES"):
        monkeypatch.delenv(each, raising=False)
    assert scratch._patience() == scratch.PATIENCE_S
    monkeypatch.setenv(name, "1")
    assert scratch._patience() == scratch.JOB_PATIENCE_S
