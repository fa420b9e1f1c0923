"""Sources: folders, globs, S3, DVC, pictures and built-in data; and the data version, which is DVC's md5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import s3
from trainer.config.load import validate
from trainer.data import builtin
from trainer.data.dvc_source import parse_dvc
from trainer.data.sources import resolve
from trainer.data.version import data_version
from trainer.errors import DataError, StorageError
from trainer.stage import execute

ROWS = "".join(f"this is text number {number} of the file,label{number % 2}\n" for number in range(60))
CONTENT = f"text,label\n{ROWS}"


def test_folder_lists_known_formats_in_order_and_skips_hidden_files(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "sub/c.parquet", ".hidden.csv", ".git/d.csv", "notes.docx"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_text("x")
    source = resolve(str(tmp_path / "raw"), "auto", tmp_path)
    assert [(file.name, file.format) for file in source.files] == [
        ("a.jsonl", "jsonl"), ("b.csv", "csv"), ("sub/c.parquet", "parquet"),
    ]  # fmt: skip


def test_glob_and_folder_of_the_same_files_have_the_same_version(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    (raw / "a.csv").write_text("one")
    (raw / "sub" / "b.csv").write_text("two")
    assert resolve(f"{raw}/**/*.csv", "auto", tmp_path).version == resolve(str(raw), "auto", tmp_path).version
    assert len(resolve(f"{raw}/*.csv", "auto", tmp_path).files) == 1


def test_the_format_given_wins_over_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text(CONTENT)
    assert resolve(str(tmp_path / "a.dat"), "csv", tmp_path).files[0].format == "csv"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with a file and a folder in its revision v1, and another content after it."""
    folder = tmp_path_factory.mktemp("repository")
    quiet = {**os.environ, "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env=quiet, timeout=120)

    def dvc(*words: str) -> None:
        run(sys.executable, "-m", "dvc", *words)

    run("git", "init", "-q")
    dvc("init", "-q")
    dvc("config", "core.analytics", "false")
    (folder / "raw.csv").write_text(CONTENT)
    for name in ("b.csv", "a.csv", "sub/z.csv", "sub/ü.csv"):
        (folder / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "many" / name).write_text(f"text,label\n{name}," + ROWS[20:])
    dvc("add", "-q", "raw.csv", "many")
    run("git", "add", ".")
    run("git", *who, "commit", "-qm", "first")
    run("git", "tag", "v1")
    (folder / "raw.csv").write_text(CONTENT + "one more text,label0\n")
    dvc("add", "-q", "raw.csv")
    run("git", *who, "commit", "-qam", "second")
    return folder


def dvc_md5(repository: Path, name: str) -> str:
    import yaml

    return str(yaml.safe_load((repository / f"{name}.dvc").read_text())["outs"][0]["md5"])


def test_data_version_is_the_md5_that_dvc_writes(repository: Path) -> None:
    assert data_version(repository / "raw.csv") == dvc_md5(repository, "raw.csv")
    assert data_version(repository / "many") == dvc_md5(repository, "many")
    assert data_version(repository / "many").endswith(".dir")


def test_dvc_source_reads_the_revision_asked_for(repository: Path, tmp_path: Path) -> None:
    old = resolve(f"dvc:{repository}@v1:raw.csv", "auto", tmp_path / "old")
    new = resolve(f"dvc:{repository}:raw.csv", "auto", tmp_path / "new")
    assert old.files[0].path.read_text() == CONTENT
    assert new.version == dvc_md5(repository, "raw.csv") != old.version


def test_dvc_source_of_a_folder_has_its_version(repository: Path, tmp_path: Path) -> None:
    source = resolve(f"dvc:{repository}@v1:many", "auto", tmp_path)
    assert [file.name for file in source.files] == ["a.csv", "b.csv", "sub/z.csv", "sub/ü.csv"]
    assert source.version == dvc_md5(repository, "many")


WRONG = {"path": "@v1:none.csv", "revision": "@v9:raw.csv"}


@pytest.mark.parametrize("name", WRONG)
def test_dvc_source_that_is_not_there(name: str, repository: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.source: dvc:"):
        resolve(f"dvc:{repository}{WRONG[name]}", "auto", tmp_path)


SPELLED = {
    "dvc:.@v1:data/raw.csv": (".", "v1", "data/raw.csv"),
    "dvc:/a/b:raw.csv": ("/a/b", "", "raw.csv"),
    "dvc:git@github.com:me/repo.git@main:raw": ("git@github.com:me/repo.git", "main", "raw"),
    "dvc:git@github.com:me/repo.git:raw": ("git@github.com:me/repo.git", "", "raw"),
    "dvc:https://example.org/me/repo@v1.0:raw": ("https://example.org/me/repo", "v1.0", "raw"),
    "dvc:https://me@example.org/me/repo:raw": ("https://me@example.org/me/repo", "", "raw"),
    "dvc:https://me@example.org/me/repo@a/b:raw": ("https://me@example.org/me/repo", "a/b", "raw"),
    "dvc:../repo@feature/x:raw": ("../repo", "feature/x", "raw"),
}


@pytest.mark.parametrize("source", SPELLED)
def test_spellings_of_a_dvc_source(source: str) -> None:
    assert parse_dvc(source) == SPELLED[source]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket with some objects."""
    import fsspec

    with s3.bucket("bucket") as uri:
        for name in ("raw.csv", "many/a.csv", "many/sub/b.csv", "many/c.txt"):
            fsspec.filesystem("s3").pipe_file(f"{uri}/{name}", CONTENT.encode())
        yield uri


def test_s3_object_prefix_and_glob(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text(CONTENT)
    assert resolve(f"{bucket}/raw.csv", "auto", tmp_path / "1").version == data_version(tmp_path / "raw.csv")
    everything = resolve(f"{bucket}/many", "auto", tmp_path / "2")
    assert [file.name for file in everything.files] == ["a.csv", "c.txt", "sub/b.csv"]
    some = resolve(f"{bucket}/many/**/*.csv", "auto", tmp_path / "3")
    assert sorted(file.name for file in some.files) == ["a.csv", "sub/b.csv"]


def test_s3_source_and_s3_output(bucket: str, tmp_path: Path) -> None:
    from trainer import storage
    from trainer.artifacts.dataset import Dataset

    params = validate(
        {"data": {"source": f"{bucket}/raw.csv", "tokenizer": {"vocab_size": 300}, "dedup": {"near": False}}}
    )
    execute("preprocess", params, {}, {"dataset": f"{bucket}/out/dataset"})
    dataset = Dataset(storage.fetch(f"{bucket}/out/dataset", tmp_path), verify=True)
    assert dataset.meta["kept"] == 60


@pytest.mark.parametrize("name", ["none.csv", "none/*.csv"])
def test_s3_object_that_is_not_there(name: str, bucket: str, tmp_path: Path) -> None:
    with pytest.raises((StorageError, DataError), match="none"):
        resolve(f"{bucket}/{name}", "auto", tmp_path)


def test_picture_folder_is_scaled_counted_and_stays_inside(tmp_path: Path) -> None:
    from PIL import Image

    from trainer.artifacts.dataset import Dataset

    folder = tmp_path / "pictures"
    (folder / "img").mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = ["file,kind"]
    for number in range(60):
        shade = 40 if number % 2 else 200
        pixels = np.clip(random.normal(shade, 20, (20, 30, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "img" / f"{number}.png")
        lines.append(f"img/{number}.png,{'dark' if number % 2 else 'light'}")
    (folder / "img" / "broken.png").write_bytes(b"no picture")
    lines += ["img/broken.png,dark", "img/none.png,dark", "../outside.png,dark"]
    (folder / "labels.csv").write_text("\n".join(lines))
    tree = {
        "data": {"source": str(folder), "text": "file", "label": "kind", "image_size": 16, "image_channels": 3},
        "task": {"name": "image"}, "model": {"name": "cnn"}, "distill": {"enabled": False},
    }  # fmt: skip
    execute("preprocess", validate(tree), {}, {"dataset": str(tmp_path / "out")})
    dataset = Dataset(tmp_path / "out", verify=True)
    assert dataset.meta["dropped"] == {"malformed:no_picture": 3}
    assert dataset.labels == ["dark", "light"]
    train = dataset.split("train")
    assert train.images.shape == (len(train), 3, 16, 16)
    assert train.images.dtype == np.uint8
    means = train.images.reshape(len(train), -1).mean(axis=1)
    assert ((means > 120) == (train.labels == 1)).all()


@pytest.mark.parametrize("name", ["stdlib-functions", "stdlib-modules", "digits"])
def test_builtin_sources_are_the_same_each_time_and_have_no_tests_in_them(name: str, tmp_path: Path) -> None:
    assert builtin.main([name, "--out", str(tmp_path / "a.jsonl")]) == 0
    if name != "stdlib-functions":  # made from the same list of files; parsing them takes seconds
        builtin.write(name, tmp_path / "b.jsonl")
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) > 300
    labels = {row["label"] for row in rows}
    assert not labels & {"test", "lib2to3", "encodings"}
    if name == "stdlib-functions":
        assert 25 <= len(labels) <= 60
        assert all(row["text"].lstrip().startswith(("def ", "async def ", "@")) for row in rows)
    if name == "digits":
        assert labels == set("0123456789")
        assert {len(row["image"]) for row in rows} == {8}


def test_digits_without_their_library_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn"):
        builtin.write("digits", tmp_path / "digits.jsonl")


def test_debian_sections_or_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paragraphs = [
        ("vim", "editors", "enhanced vi editor"), ("vim-doc", "doc", "documentation of vim"),
        ("gcc", "universe/devel", "GNU C compiler"), ("mutt", "mail", "mail reader"), ("mutt2", "mail", "mail reader"),
        ("odd", "mail", "two sections"), ("odd2", "web", "two sections"),
    ]  # fmt: skip
    text = "\n".join(f"Package: {p}\nSection: {s}\nDescription: {d}\n more: of it\n" for p, s, d in paragraphs)
    script = tmp_path / "apt-cache"
    script.write_text(f"#!{sys.executable}\nprint({text!r})\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(builtin.debian_sections()) == [
        {"text": "enhanced vi editor", "label": "editors"}, {"text": "mail reader", "label": "mail"},
    ]  # fmt: skip
    script.write_text(f"#!{sys.executable}\n")
    with pytest.raises(DataError, match="no apt package lists"):
        list(builtin.debian_sections())
    script.unlink()
    with pytest.raises(DataError, match="apt-cache cannot be run"):
        list(builtin.debian_sections())
