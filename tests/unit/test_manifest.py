"""The manifest: whatever is altered in an artifact folder is found, and equal content has an equal digest."""

import json
import os
import random
import shutil

import pytest

from tests.toy import make
from trainer.artifacts import manifest
from trainer.artifacts.manifest import read, safe_path, seal
from trainer.errors import ArtifactError, StorageError


@pytest.fixture
def artifact(tmp_path):
    return make(
        tmp_path / "artifact",
        meta={"rows": 3, "share": 1e-05, "name": "é", "big": 1e22, "nested": {"a": [1, None, True]}},
    )


def refused(folder, kind="dataset", match="."):
    with pytest.raises(ArtifactError, match=match) as caught:
        read(folder, kind)
    assert caught.value.hint
    return caught.value


def test_an_intact_artifact_is_accepted(artifact):
    found = read(artifact, "dataset")
    assert [file.path for file in found.files] == ["a.bin", "empty", "sub/b.txt"]
    assert found.meta["share"] == 1e-05
    assert read(artifact).digest == found.digest


def test_flipped_bits_of_the_manifest_are_found(artifact):
    path = artifact / "manifest.json"
    content = path.read_bytes()
    generator = random.Random(0)
    flips = [(generator.randrange(len(content)), generator.randrange(8)) for _ in range(800)]
    # One that leaves the JSON equal: 1e-05 and 1E-05.
    flips += [(content.index(text) + 1, 5) for text in (b"1e-05", b"1e+22")]
    for position, bit in flips:
        path.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
        with pytest.raises(ArtifactError):
            read(artifact, verify=False)
    path.write_bytes(content)
    read(artifact)


def test_flipped_bits_of_files_are_found_and_the_file_is_named(artifact):
    generator = random.Random(0)
    for name in ("a.bin", "sub/b.txt"):
        path = artifact / name
        content = path.read_bytes()
        for _ in range(60):
            position, bit = generator.randrange(len(content)), generator.randrange(8)
            path.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
            assert str(path) in refused(artifact).message
        path.write_bytes(content)
    read(artifact)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_manifest_is_found(artifact, size):
    path = artifact / "manifest.json"
    path.write_bytes(path.read_bytes()[:size])
    refused(artifact, match=r"manifest\.json: corrupted")


def rewrite(folder, change):
    """Alter the manifest and seal it again, as whoever tampers with it would."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["seal"]
    change(body)
    body["seal"] = manifest.hashlib.sha256(manifest.canonical(body)).hexdigest()
    path.write_bytes(manifest._serialise(body))


def swap(folder):
    (folder / "a.bin").rename(folder / "c")
    (folder / "sub/b.txt").rename(folder / "a.bin")
    (folder / "c").rename(folder / "sub/b.txt")


def relink(folder):
    (folder / "a.bin").rename(folder.parent / "aside")
    (folder / "a.bin").symlink_to(folder.parent / "aside")


def relink_folder(folder):
    (folder / "sub").rename(folder.parent / "aside")
    (folder / "sub").symlink_to(folder.parent / "aside")


def relink_manifest(folder):
    (folder / "manifest.json").rename(folder.parent / "aside")
    (folder / "manifest.json").symlink_to(folder.parent / "aside")


def named(path):
    return lambda folder: rewrite(folder, lambda body: body["files"][0].update(path=path))


ALTERATIONS = {
    "missing file": (lambda folder: (folder / "a.bin").unlink(), "a.bin: missing"),
    "missing empty file": (lambda folder: (folder / "empty").unlink(), "empty: missing"),
    "missing folder": (lambda folder: shutil.rmtree(folder / "sub"), "b.txt: missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "folder for a file": (lambda folder: ((folder / "empty").unlink(), (folder / "empty").mkdir()), "empty: missing"),
    "surplus file": (lambda folder: (folder / "x.pkl").write_bytes(b""), "x.pkl: not in the manifest"),
    "surplus file below": (lambda folder: (folder / "sub" / "x").write_bytes(b""), "x: not in the manifest"),
    "surplus hidden file": (lambda folder: (folder / ".x").write_bytes(b""), ".x: not in the manifest"),
    "surplus broken link": (lambda folder: (folder / "x").symlink_to("/nowhere"), "x: not in the manifest"),
    "surplus link to a folder": (lambda folder: (folder / "x").symlink_to("/"), "x: not in the manifest"),
    "surplus pipe": (lambda folder: os.mkfifo(folder / "x"), "x: not in the manifest"),
    "surplus manifest below": (lambda folder: shutil.copy(folder / "manifest.json", folder / "sub"), "not in the manifest"),
    "longer": (lambda folder: (folder / "a.bin").write_bytes(bytes(range(256)) + b"x"), "a.bin: corrupted"),
    "shorter": (lambda folder: (folder / "a.bin").write_bytes(bytes(range(255))), "a.bin: corrupted"),
    "emptied": (lambda folder: (folder / "a.bin").write_bytes(b""), "a.bin: corrupted"),
    "filled": (lambda folder: (folder / "empty").write_bytes(b"x"), "empty: corrupted"),
    "swapped": (swap, "corrupted"),
    "link": (relink, "a.bin"),
    "link to a folder": (relink_folder, "leads out"),
    "link to the manifest": (relink_manifest, "no manifest.json"),
    "absolute name": (named("/etc/passwd"), "not a path inside"),
    "parent name": (named("../a"), "not a path inside"),
    "parent inside": (named("sub/../a.bin"), "not a path inside"),
    "backslash": (named("..\\a"), "not a path inside"),
    "NUL": (named("a\0"), "not a path inside"),
    "empty name": (named(""), "not a path inside"),
    "later format": (lambda folder: rewrite(folder, lambda body: body.update(format=2)), "format 2"),
    "other kind": (lambda folder: rewrite(folder, lambda body: body.update(kind="model")), "holds a model, a dataset is needed"),
    "other meta": (lambda folder: rewrite(folder, lambda body: body["meta"].update(rows=4)), "digest does not match"),
    "other digest": (lambda folder: rewrite(folder, lambda body: body.update(digest="0" * 64)), "digest does not match"),
    "forgotten file": (lambda folder: rewrite(folder, lambda body: body["files"].pop()), "corrupted"),
    "made volatile": (lambda folder: rewrite(folder, lambda body: body["files"][0].update(volatile=True)), "corrupted"),
    "no files": (lambda folder: rewrite(folder, lambda body: body.pop("files")), "not a manifest"),
    "unknown field of a file": (lambda folder: rewrite(folder, lambda body: body["files"][0].update(x=1)), "not a manifest"),
    "files of another type": (lambda folder: rewrite(folder, lambda body: body.update(files=3)), "not a manifest"),
    "a list": (lambda folder: (folder / "manifest.json").write_bytes(b"[]"), "not a manifest"),
    "not UTF-8": (lambda folder: (folder / "manifest.json").write_bytes(b'{"a": "\xff"}'), "not a manifest"),
    "NaN": (lambda folder: (folder / "manifest.json").write_bytes(b'{"a": NaN}'), "not a manifest"),
    "deep": (lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000), "not a manifest"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALTERATIONS)
def test_alterations_are_found(artifact, case):
    alter, message = ALTERATIONS[case]
    alter(artifact)
    assert message in refused(artifact).message


def test_a_file_or_nothing_in_place_of_a_folder_is_refused(tmp_path):
    refused(tmp_path / "nothing", match="no manifest")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", match="no manifest")


def test_the_wrong_kind_is_refused(artifact):
    refused(artifact, "model", match="holds a dataset, a model is needed")


def test_empty_folders_do_not_matter(artifact):
    (artifact / "void").mkdir()
    read(artifact)


def test_a_linked_artifact_folder_is_accepted(artifact, tmp_path):
    (tmp_path / "link").symlink_to(artifact)
    assert read(tmp_path / "link").digest == read(artifact).digest


def test_a_link_inside_the_artifact_is_refused_although_its_content_is_right(tmp_path):
    folder = make(tmp_path / "artifact", files={"a": b"1", "b": b"1"})
    (folder / "b").unlink()
    (folder / "b").symlink_to("a")
    refused(folder, match="b: missing")


def test_an_artifact_with_a_link_cannot_be_sealed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="no symbolic links"):
        seal(tmp_path, "model", {}, {})


def test_the_digest_is_of_the_content_alone(tmp_path):
    def digest(folder, *, record=None, volatile=b"1", kind="model", meta=None, name="a"):
        folder.mkdir()
        (folder / name).write_bytes(b"content")
        (folder / "log").write_bytes(volatile)
        return seal(folder, kind, meta or {"x": 1, "y": 2}, record or {}, ["log"]).digest

    first = digest(tmp_path / "1")
    assert digest(tmp_path / "2", record={"seconds": 7.0}, volatile=b"2") == first
    assert digest(tmp_path / "3", meta={"y": 2, "x": 1}) == first
    assert (
        len(
            {
                digest(tmp_path / "4", kind="other"),
                digest(tmp_path / "5", meta={"x": 2}),
                digest(tmp_path / "6", name="b"),
                first,
            }
        )
        == 4
    )


def test_volatile_files_are_checked_as_well(tmp_path):
    (tmp_path / "log").write_bytes(b"1")
    seal(tmp_path, "model", {}, {}, ["log"])
    (tmp_path / "log").write_bytes(b"2")
    refused(tmp_path, "model", match="log: corrupted")


def test_numbers_that_json_does_not_have_are_refused_when_sealing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        seal(tmp_path, "model", {"x": float("nan")}, {})
    assert not (tmp_path / "manifest.json").exists()


def test_names_inside_are_resolved(tmp_path):
    assert safe_path(tmp_path, "a/b.txt") == tmp_path / "a/b.txt"


def test_an_unreadable_artifact_is_a_storage_error(tmp_path):
    folder = tmp_path / ("x" * 300)
    with pytest.raises((StorageError, ArtifactError), match="x"):
        read(folder)
