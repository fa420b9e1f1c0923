"""Scratch folders: who may enter them, and what is left."""

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


def test_a_folder_that_is_removed_while_it_is_locked_is_made_again(tmp_path):
    """As `preprocess` leaves nothing of its own: whoever waited must not go on in a folder that is gone."""
    output = str(tmp_path / "out")
    with scratch.held("train", "0" * 12, output) as first:
        descriptor = os.open(first, os.O_RDONLY)
    try:
        assert not first.exists()
        with scratch.held("train", "0" * 12, output) as second:
            assert second == first
            assert not os.path.samestat(os.fstat(descriptor), second.stat())
            assert scratch._try_lock(second) is None
    finally:
        os.close(descriptor)


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
