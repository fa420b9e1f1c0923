"""URIs: what is local, what is fetched, what an error says."""

import errno
import os

import pytest

from trainer import storage
from trainer.errors import ConfigError, StorageError


@pytest.mark.parametrize(
    "uri", ["s3://b/x", "memory://x", "gs://b", "abfs://c@a.dfs.core.windows.net/x", "https://h/x"]
)
def test_remote_uris(uri):
    assert storage.is_remote(uri)
    with pytest.raises(StorageError, match="not a local path"):
        storage.local_path(uri)


@pytest.mark.parametrize("uri", ["out/x", "/out/x", "file:///out/x", "C:x", "~/x", ".", "a:b"])
def test_local_uris(uri):
    assert not storage.is_remote(uri)
    storage.local_path(uri)


@pytest.mark.parametrize("uri", ["a\0b", "~nobody-of-that-name/x"])
def test_impossible_paths_are_explained(uri):
    with pytest.raises(StorageError):
        storage.local_path(uri)


@pytest.mark.parametrize(("uri", "word"), [("nosuch://x/y", "nosuch"), ("://x", "://"), ("s4://b/x", "s4")])
def test_unknown_protocols_are_explained(uri, word, tmp_path):
    with pytest.raises(StorageError, match=word) as caught:
        storage.fetch(uri, tmp_path)
    assert caught.value.hint


def test_keys_that_lead_out_of_the_folder_are_refused(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe_file("/folder/manifest.json", b"{}")
    evil = fs.store["/folder/manifest.json"]
    fs.store["/folder/../../evil"] = evil
    try:
        with pytest.raises(StorageError, match="leads out"):
            storage.fetch("memory://folder", tmp_path / "deep" / "cache")
    finally:
        fs.store.clear()
    assert not any(path.name == "evil" for path in tmp_path.rglob("*"))


def test_markers_of_folders_are_not_files(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe_file("/folder/sub/a", b"1")
    try:
        folder = storage.fetch("memory://folder/", tmp_path)
        assert (folder / "sub/a").read_bytes() == b"1"
        assert storage.read_bytes("memory://folder/sub/a") == b"1"
        assert storage.fetch("memory://folder/sub/a", tmp_path / "one").read_bytes() == b"1"
        assert storage.exists("memory://folder/sub/a")
        assert not storage.exists("memory://folder/b")
    finally:
        fs.store.clear()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EISDIR, errno.EIO])
def test_system_errors_are_explained_with_the_file_and_a_fix(number):
    with pytest.raises(StorageError) as caught, storage.explained("out/x"):
        raise OSError(number, os.strerror(number), "out/x/file")
    assert caught.value.message == f"out/x/file: {os.strerror(number)}"
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_only_the_chosen_errors_are_explained():
    with pytest.raises(FileNotFoundError), storage.explained("x", storage.UNWRITABLE):
        raise FileNotFoundError(errno.ENOENT, "gone", "y")
    with pytest.raises(StorageError), storage.explained("x", storage.UNWRITABLE):
        raise OSError(errno.ENOSPC, "full")


def test_other_errors_pass_through_untouched():
    for error in (BrokenPipeError(), ConfigError("x", "y"), KeyboardInterrupt(), RuntimeError("bug")):
        with pytest.raises(type(error)) as caught, storage.explained("x"):
            raise error
        assert caught.value is error


def test_errors_of_drivers_are_explained_for_remote_uris_without_their_secrets():
    with pytest.raises(StorageError) as caught, storage.explained("s3://bucket/x"):
        raise RuntimeError("cannot reach https://user:secret@host/x?X-Amz-Signature=secret")
    assert "secret" not in str(caught.value)
    assert "s3://bucket/x: RuntimeError" in caught.value.message


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    storage.write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space"):
            storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_writing_below_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        storage.write_atomic(tmp_path / "file" / "x", b"")


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    storage.remove(tmp_path / "link")
    storage.remove(tmp_path / "nothing")
    assert (tmp_path / "kept" / "file").exists()
    assert not (tmp_path / "link").is_symlink()
