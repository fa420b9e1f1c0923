"""Atomic publishing in one process: what is replaced, what is never replaced, what is swept."""

import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import make
from trainer.artifacts import manifest
from trainer.artifacts.publish import building, sweep
from trainer.errors import StorageError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def publish(target, content=b"new"):
    with building(target) as folder:
        (folder / "file").write_bytes(content)
        manifest.seal(folder, "model", {}, {})


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_an_artifact_appears_whole_and_is_replaced(tmp_path):
    target = tmp_path / "deep" / "model"
    for content in (b"old", b"new"):
        publish(target, content)
        manifest.read(target, "model")
        assert (target / "file").read_bytes() == content
        assert names(target.parent) == ["model"]


def test_nothing_is_left_of_a_failure(tmp_path):
    publish(tmp_path / "model", b"old")

    def interrupted():
        with building(tmp_path / "model") as folder:
            (folder / "file").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "file").read_bytes() == b"old"


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "model").write_text("my thesis")
    with pytest.raises(StorageError, match="is a file"):
        publish(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "my thesis"


def test_a_folder_that_is_no_artifact_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("x")
    with pytest.raises(StorageError, match="holds files that are no artifact"):
        publish(tmp_path / "home")
    assert (tmp_path / "home" / "thesis").read_text() == "x"


def test_files_that_appear_while_the_stage_runs_are_not_replaced(tmp_path):
    def overtaken():
        with building(tmp_path / "model") as folder:
            (folder / "file").write_bytes(b"new")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "thesis").write_text("x")

    with pytest.raises(StorageError, match="holds files"):
        overtaken()
    assert names(tmp_path / "model") == ["thesis"]


def test_the_root_and_the_working_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    for target in (Path("/"), Path(), Path("..")):
        with pytest.raises(StorageError), building(target):
            pass
    assert names(tmp_path) == ["file"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    publish(tmp_path / "model")
    manifest.read(tmp_path / "model")


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(StorageError, match="out"):
        publish(tmp_path / "out" / "model")


def test_a_linked_target_keeps_its_link(tmp_path):
    disk = make(tmp_path / "disk" / "model", "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").symlink_to(disk)
    publish(tmp_path / "out" / "model")
    assert (tmp_path / "out" / "model").is_symlink()
    assert (disk / "file").read_bytes() == b"new"


def test_others_may_read_what_is_published(tmp_path):
    publish(tmp_path / "model")
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def temporary(target, pid, suffix="1.tmp"):
    return target.with_name(f".{target.name}.{socket.gethostname()}.{pid}.{suffix}")


def test_what_dead_processes_left_is_swept_and_what_live_ones_build_is_not(tmp_path):
    target = tmp_path / "mo[d]el*"
    left = temporary(target, dead_process())
    live = temporary(target, os.getppid())
    foreign = tmp_path / f".{target.name}.elsewhere.1.1.tmp"
    for folder in (left, live, foreign):
        folder.mkdir()
        (folder / "file").write_text("x")
    publish(target)
    assert not left.exists()
    assert live.exists()
    assert foreign.exists()


def test_a_folder_whose_lock_is_held_is_not_swept_although_its_process_id_means_nothing_here(tmp_path):
    target = tmp_path / "model"
    folder = temporary(target, dead_process())
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    sweep(target)
    assert folder.exists()
    os.close(descriptor)
    sweep(target)
    assert not folder.exists()


def test_the_old_artifact_is_put_back_if_its_replacement_was_killed_half_way(tmp_path):
    target = tmp_path / "model"
    old = make(temporary(target, dead_process(), "1.old.tmp"), "model")
    digest = manifest.read(old).digest
    sweep(target)
    assert manifest.read(target).digest == digest
    assert names(tmp_path) == ["model"]


def test_a_predecessor_with_the_same_process_id_is_swept(tmp_path):
    left = temporary(tmp_path / "model", os.getpid(), "7.tmp")
    left.mkdir()
    publish(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_the_last_of_two_that_build_the_same_wins(tmp_path):
    target = tmp_path / "model"
    with building(target) as first:
        publish(target, b"second")
        assert first.exists()
        (first / "file").write_bytes(b"first")
        manifest.seal(first, "model", {}, {})
    assert (target / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["model"]
