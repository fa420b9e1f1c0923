"""The preprocess stage as a whole: what it keeps, counts and refuses, from each kind of source."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.artifacts import manifest
from trainer.artifacts.dataset import END, SPLITS, Dataset
from trainer.config.load import validate
from trainer.data import chunks, engine, kernels, stage
from trainer.errors import DataError, MillraceError, StorageError
from trainer.stage import execute

WORDS = [f"word{number}" for number in range(400)]


def sentences(number: int, seed: int = 0, length: int = 12) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(number)]


def rows(number: int, labels: int = 3, seed: int = 0) -> list[dict[str, str]]:
    return [{"text": text, "label": f"l{i % labels}"} for i, text in enumerate(sentences(number, seed))]


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def preprocess(out: Path, source: Path | str, task: str = "classify", **data: Any) -> Dataset:
    tree = {"data": {"source": str(source), "tokenizer": {"vocab_size": 300}, **data}, "task": {"name": task}}
    if task != "classify":
        tree |= {"model": {"name": "decoder" if task == "lm" else "cnn"}, "distill": {"enabled": False}}
    execute("preprocess", validate(tree), {}, {"dataset": str(out)})
    return Dataset(out, verify=True)


def assert_consistent(dataset: Dataset) -> None:
    """Counts add up, arrays fit their rows, rows are ordered and none is in two splits."""
    meta = dataset.meta
    assert meta["num_read"] == meta["kept"] + sum(meta["dropped"].values())
    assert meta["kept"] == sum(meta["rows"].values())
    seen: set[str] = set()
    for name in SPLITS:
        part = dataset.split(name)
        ids, texts = part.column("id"), part.texts()
        assert len(part) == meta["rows"][name] == len(ids)
        assert ids == sorted(ids)
        assert not seen.intersection(ids)
        seen.update(ids)
        if dataset.spec.task != "image":
            assert part.offsets[0] == 0
            assert part.offsets[-1] == len(part.tokens) == meta["tokens"][name]
            assert meta["bytes"][name] == sum(len(text.encode()) for text in texts)
        if dataset.spec.task != "lm":
            assert part.labels.tolist() == part.column("label")
    if dataset.labels:
        assert sum(meta["label_counts"].values()) == meta["kept"]
        assert list(meta["label_counts"]) == dataset.labels == sorted(dataset.labels)


def test_a_row_says_where_it_came_from(tmp_path: Path) -> None:
    items = rows(60)
    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items))
    assert_consistent(dataset)
    for name in SPLITS:
        part = dataset.split(name)
        for text, label, source in zip(part.texts(), part.labels, part.column("source"), strict=True):
            item = items[int(source.removeprefix("a.jsonl:")) - 1]
            assert (text, dataset.labels[label]) == (item["text"], item["label"])


def test_tokens_are_those_of_the_tokenizer_cut_to_length(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", rows(60)), max_length=16)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    train = dataset.split("train")
    for row, text in enumerate(train.texts()):
        expected = tokenizer.encode(text, add_special_tokens=False).ids[:16]
        assert train.tokens[train.offsets[row] : train.offsets[row + 1]].tolist() == expected
    assert dataset.spec.vocab_size == tokenizer.get_vocab_size() == 300


def test_documents_of_a_language_model_end_in_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(80)))
    dataset = preprocess(tmp_path / "out", tmp_path / "a.txt", "lm")
    assert_consistent(dataset)
    train = dataset.split("train")
    assert (train.tokens[train.offsets[1:] - 1] == END).all()
    assert (np.asarray(train.tokens) == END).sum() == len(train)
    assert dataset.labels == []
    assert set(train.column("label")) == {-1}


def test_dialogues_and_pairs_become_documents_with_roles(tmp_path: Path) -> None:
    texts = sentences(60)
    dialogues = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(texts[:30], texts[30:], strict=True)
    ]
    pairs = [{"input": q, "output": a} for q, a in zip(texts[:30], texts[30:], strict=True)]
    (tmp_path / "dialogues.json").write_text(json.dumps({"conversations": dialogues}))
    (tmp_path / "pairs.json").write_text(json.dumps({"examples": pairs}))
    first = preprocess(tmp_path / "one", tmp_path / "dialogues.json", "lm")
    second = preprocess(tmp_path / "two", tmp_path / "pairs.json", "lm")
    assert first.split("train").texts() == second.split("train").texts()
    assert first.split("train").texts()[0].startswith("<|user|>\nword")


def test_formats_give_the_same_texts(tmp_path: Path) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    items = [{**row, "text": row["text"] + ',\n"quoted"'} for row in rows(60)]
    write_jsonl(tmp_path / "a.jsonl", items)
    (tmp_path / "a.json").write_text(json.dumps(items))
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "a.parquet")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"a.{suffix}", "w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(items)
    found = []
    for suffix in ("jsonl", "json", "parquet", "csv", "tsv"):
        dataset = preprocess(tmp_path / suffix, tmp_path / f"a.{suffix}")
        assert_consistent(dataset)
        found.append([dataset.split(name).texts() for name in SPLITS])
    assert all(each == found[0] for each in found)


def test_every_dropped_row_is_counted_by_its_reason(tmp_path: Path) -> None:
    base = rows(60)
    near = [{"text": row["text"] + " and", "label": row["label"]} for row in rows(3, seed=7)]
    near = [{"text": " ".join(sentences(1, seed=9, length=80)) + end, "label": "l0"} for end in ("", " more")]
    items = [
        *base, base[0], base[1], *near,
        {"text": "x", "label": "l0"}, {"text": "y" * 2000, "label": "l0"}, {"text": " ", "label": "l0"},
        {"text": "some text of a rare label", "label": "rare"}, {"txt": 1}, [1], {"text": "a text", "label": None},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", items)
    path.write_text(path.read_text() + "not json\n")
    dataset = preprocess(tmp_path / "out", path, clean={"min_chars": 2, "max_chars": 1000})
    assert_consistent(dataset)
    assert dataset.meta["dropped"] == {
        "duplicate": 2, "near_duplicate": 1, "too_short": 1, "too_long": 1, "empty": 1, "rare_label": 1,
        "malformed:no_text": 1, "malformed:not_object": 1, "malformed:no_label": 1, "malformed:not_json": 1,
    }  # fmt: skip
    card = (dataset.folder / "card.md").read_text()
    assert "| near duplicate | 1 |" in card


def test_of_equal_texts_the_most_frequent_label_stays(tmp_path: Path) -> None:
    items = [*rows(60), *({"text": "the same words each time", "label": label} for label in ("l2", "l1", "l2", "l0"))]
    random.Random(1).shuffle(items)
    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items))
    found = [
        dataset.labels[label]
        for name in SPLITS
        for text, label in zip(dataset.split(name).texts(), dataset.split(name).labels, strict=True)
        if text == "the same words each time"
    ]
    assert found == ["l2"]


def test_without_removal_equal_texts_fall_into_the_same_split(tmp_path: Path) -> None:
    items = rows(40) * 3
    off = {"exact": False, "near": False}
    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items), dedup=off)
    assert dataset.meta["kept"] == 120
    assert_consistent(dataset)


def test_the_order_of_the_rows_changes_nothing_but_their_lines(tmp_path: Path) -> None:
    items = [*rows(200), *rows(200)[:50]]
    first = preprocess(tmp_path / "one", write_jsonl(tmp_path / "a.jsonl", items))
    random.Random(0).shuffle(items)
    second = preprocess(tmp_path / "two", write_jsonl(tmp_path / "a.jsonl", items))
    for name in SPLITS:
        left, right = first.split(name), second.split(name)
        assert left.texts() == right.texts()
        assert np.array_equal(left.tokens, right.tokens)
        assert np.array_equal(left.labels, right.labels)


def test_more_rows_do_not_move_the_others(tmp_path: Path) -> None:
    few = preprocess(tmp_path / "one", write_jsonl(tmp_path / "a.jsonl", rows(100)))
    many = preprocess(tmp_path / "two", write_jsonl(tmp_path / "b.jsonl", [*rows(100), *rows(300, seed=5)]))
    for name in SPLITS:
        assert set(few.split(name).texts()) <= set(many.split(name).texts())


def test_max_rows_takes_the_smallest_hashes_and_stays_exact(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(300))
    whole = preprocess(tmp_path / "one", path)
    some = preprocess(tmp_path / "two", path, max_rows=120)
    assert some.meta["kept"] == 120
    assert some.meta["dropped"] == {"over_max_rows": 180}
    ids = sorted(row for name in SPLITS for row in whole.split(name).column("id"))
    assert sorted(row for name in SPLITS for row in some.split(name).column("id")) == ids[:120]
    assert_consistent(some)


def test_labels_that_max_rows_makes_rare_go(tmp_path: Path) -> None:
    items = [*rows(400, labels=2), *({"text": text, "label": "few"} for text in sentences(4, seed=3))]
    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items), max_rows=100, min_label_rows=4)
    assert dataset.labels == ["l0", "l1"]
    assert_consistent(dataset)


def test_stratified_split_is_exact(tmp_path: Path) -> None:
    split = {"val": 0.2, "test": 0.2, "stratify": True}
    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", rows(150)), split=split)
    assert_consistent(dataset)
    for name, number in (("train", 30), ("val", 10), ("test", 10)):
        assert np.bincount(dataset.split(name).labels).tolist() == [number] * 3


ENGINES = {"pool": (0, "classify"), "daft": (256 << 20, "lm")}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Daft's pipes
def test_same_digest_on_every_engine_with_any_number_of_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light, task = ENGINES[name]
    items: list[Any] = [*rows(900), *rows(100), {"bad": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", items)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(chunks, "_BLOCK", 1000)
    monkeypatch.setattr(stage, "PARTITION_BYTES", 30_000)
    alone = preprocess(tmp_path / "inline", path, task)
    assert len(alone.split("train").texts()) > 500
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    monkeypatch.setattr(engine, "LIGHT_BYTES", light)
    for workers in (1, 2):
        dataset = preprocess(tmp_path / f"{workers}", path, task, engine=name, workers=workers)
        assert dataset.manifest.digest == alone.manifest.digest


def test_nothing_of_the_work_is_left_behind(tmp_path: Path) -> None:
    preprocess(tmp_path / "out" / "dataset", write_jsonl(tmp_path / "a.jsonl", rows(60)))
    with pytest.raises(DataError):
        preprocess(tmp_path / "out" / "other", write_jsonl(tmp_path / "b.jsonl", rows(60, labels=1)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset"]


def csv_file(content: str | bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / "a.csv")

    return make


def truncated_parquet(folder: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(100)), folder / "a.parquet")
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-200])
    return str(folder / "a.parquet")


def damaged_parquet(folder: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(1000)), folder / "a.parquet")
    content = bytearray((folder / "a.parquet").read_bytes())
    content[100:400] = bytes(300)
    (folder / "a.parquet").write_bytes(content)
    return str(folder / "a.parquet")


def jsonl_file(items: list[Any]) -> Callable[[Path], str]:
    return lambda folder: str(write_jsonl(folder / "a.jsonl", items))


def text_file(name: str, content: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    return make


def empty_folder(folder: Path) -> str:
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.docx").write_text("x")
    return str(folder / "sub")


HEAD = "text,label\n"
MANY = HEAD + "".join(f"{text},l{i % 2}\n" for i, text in enumerate(sentences(60)))
BAD_INPUT: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing file": (lambda folder: str(folder / "none.csv"), "none.csv: no such file or folder"),
    "glob without match": (lambda folder: str(folder / "*.csv"), "no file matches"),
    "unknown format": (text_file("x.docx", "x"), "format of x.docx"),
    "empty file": (csv_file(""), "a.csv: the file is empty"),
    "header only": (csv_file(HEAD), "a.csv: there is a header but no row"),
    "empty folder": (empty_folder, "no file of a known format"),
    "one class": (csv_file(HEAD + "".join(f"{text},l0\n" for text in sentences(60))), "only the label 'l0'"),
    "text column absent": (csv_file(MANY.replace("text,", "texts,", 1)), "no column 'text'; did you mean 'texts'"),
    "label column absent": (csv_file(MANY.replace(",label", ",lable", 1)), "no column 'label'; did you mean 'lable'"),
    "column twice": (csv_file(MANY.replace("text,label", "text,label,label", 1)), "column 'label' appears twice"),
    "label key absent": (jsonl_file([{"text": "a", "lbl": "x"}] * 60), "line 1: has no key 'label'; did you mean 'lbl'"),
    "not UTF-8": (csv_file(MANY.replace("word", "w\xf6rd").encode("latin-1")), "line 2: is not UTF-8 (byte 0xf6"),
    "UTF-16": (csv_file(MANY.encode("utf-16")), "a.csv"),
    "binary": (csv_file(bytes(range(256)) * 40), "a.csv"),
    "semicolons": (csv_file(MANY.replace(",", ";")), "a.csv: line 1: the header has no comma but a semicolon"),
    "tabs": (csv_file(MANY.replace(",", "\t")), "a.csv: line 1: the header has no comma but a tab"),
    "JSON lines named .json": (
        text_file("a.json", "".join(json.dumps(row) + "\n" for row in rows(60))), "a.json: line 2: more follows"
    ),
    "list after list": (
        text_file("a.json", json.dumps(rows(60)) + "\n" + json.dumps(rows(600, seed=1))), "a.json: line 2: more follows"
    ),
    "truncated Parquet": (truncated_parquet, "a.parquet: not a complete Parquet file"),
    "damaged Parquet": (damaged_parquet, "a.parquet: row"),
    "all rows dropped": (csv_file(HEAD + ",x\n,y\n,x\n"), "no row is left of 3 (empty 3)"),
    "nothing is JSON": (text_file("a.jsonl", "hello\n" * 9), "a.jsonl: line 1: is not JSON"),
    "text for a classifier": (text_file("a.txt", "hello\n" * 9), "plain text has no labels"),
    "too few rows to split": (csv_file(HEAD + "aa,x\nbb,y\ncc,x\ndd,y\n"), "split is empty"),
    "unknown builtin": (lambda folder: "builtin:digit", "did you mean 'digits'"),
    "not a DVC source": (lambda folder: "dvc:nothing", "not of the form dvc:REPO@REV:PATH"),
    "folder is no picture folder": (lambda folder: str(folder), "no file of a known format"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_with_a_message_and_nothing_written(name: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    make, message = BAD_INPUT[name]
    with pytest.raises(MillraceError) as error:
        preprocess(tmp_path / "out" / "dataset", make(raw))
    assert error.value.exit_code == 2
    assert message in error.value.message
    assert error.value.hint
    assert not list((tmp_path / "out").iterdir())


def test_bad_rows_are_dropped_up_to_the_limit_and_the_row_after_it_is_named(tmp_path: Path) -> None:
    items: list[Any] = rows(300)
    for place in (10, 20, 30, 40):
        items.insert(place - 1, {"text": place})
    path = write_jsonl(tmp_path / "a.jsonl", items)
    dataset = preprocess(tmp_path / "out", path, max_bad_rows=4)
    assert dataset.meta["dropped"] == {"malformed:text_not_string": 4}
    with pytest.raises(DataError, match=r"^a\.jsonl: line 30: key 'text' is a number.*the first is a\.jsonl: line 10"):
        preprocess(tmp_path / "none", path, max_bad_rows=2)


def test_a_row_that_is_not_utf8_is_a_bad_row_even_in_a_small_file(tmp_path: Path) -> None:
    source = csv_file(MANY.replace("word", "w\xf6rd", 1).encode("latin-1"))(tmp_path)
    assert preprocess(tmp_path / "out", source).meta["dropped"] == {"malformed:encoding": 1}
    with pytest.raises(DataError, match=r"line 2: is not UTF-8.*data\.max_bad_rows=0") as error:
        preprocess(tmp_path / "none", source, max_bad_rows=0)
    assert "data.encoding" in error.value.hint


def test_the_row_after_a_limit_of_thousands_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(100), *([[1]] * 3000)])
    with pytest.raises(DataError, match=r"^a\.jsonl: line 1601: "):
        preprocess(tmp_path / "none", path, max_bad_rows=1500)


def test_equal_texts_with_several_labels_fall_into_the_same_split(tmp_path: Path) -> None:
    items = [{"text": text, "label": f"l{label}"} for text in sentences(60) for label in range(3)]
    off = {"exact": False, "near": False}
    split = {"stratify": True, "val": 0.2, "test": 0.2}
    dataset = preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items), dedup=off, split=split)
    assert dataset.meta["kept"] == 180
    texts = [set(dataset.split(name).texts()) for name in SPLITS]
    assert all(texts)
    assert sum(map(len, texts)) == 60


def test_errors_in_a_rewritten_file_name_the_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_LINE", 1000)
    monkeypatch.setattr(chunks, "_BLOCK", 500)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("x" * 3000).encode("utf-16"))
    with pytest.raises(DataError, match=r"^rows\.jsonl: line 1: longer"):
        preprocess(tmp_path / "out", path, encoding="utf-16")


def test_the_named_row_does_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items: list[Any] = rows(300)
    for place in (10, 120, 230, 240):
        items.insert(place - 1, [place])
    path = write_jsonl(tmp_path / "a.jsonl", items)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(chunks, "_BLOCK", 500)
    with pytest.raises(DataError, match=r"^a\.jsonl: line 230: "):
        preprocess(tmp_path / "none", path, max_bad_rows=2)


def test_a_csv_without_header_shows_little_of_its_first_row(tmp_path: Path) -> None:
    row = ",".join(f"cell {number} " + "x" * 60 for number in range(30))
    with pytest.raises(DataError) as error:
        preprocess(tmp_path / "out", csv_file(f"{row}\n" * 60)(tmp_path))
    shown = str(error.value)
    assert "header" in error.value.hint
    assert shown.count("cell") == 12
    assert "x" * 41 not in shown


@pytest.mark.parametrize(("number", "said"), [(0, False), (2, True)])
def test_the_screen_says_why_rows_were_dropped(
    number: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [*rows(60), *rows(60)[:number], *([[1]] * number)]
    preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items))
    lines = capsys.readouterr().out.splitlines()
    assert ("preprocess: dropped duplicate=2 malformed:not_object=2" in lines) is said
    assert any(line.startswith("preprocess: dropped") for line in lines) is said


def test_a_password_in_the_source_reaches_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    uri = "memory://user:hunter2@host/a.jsonl"
    fs, path = fsspec.core.url_to_fs(uri)
    fs.pipe(path, write_jsonl(tmp_path / "a.jsonl", rows(60)).read_bytes())
    dataset = preprocess(tmp_path / "out", uri)
    assert dataset.meta["source"] == "memory://***@host/a.jsonl"
    files = [file for file in dataset.folder.rglob("*") if file.is_file()]
    assert not [file for file in files if b"hunter2" in file.read_bytes()]
    assert "hunter2" not in "".join(capsys.readouterr())


def test_the_card_shows_labels_as_they_are(tmp_path: Path) -> None:
    items = [{**row, "label": row["label"].replace("l0", "`<script>|x`")} for row in rows(60)]
    folder = tmp_path / "<b>`raw`"
    folder.mkdir()
    dataset = preprocess(tmp_path / "out", write_jsonl(folder / "a.jsonl", items))
    text = (dataset.folder / "card.md").read_text()
    assert "| `'<script>\\|x'` | 20 |" in text
    assert text.count("<script>") == 1
    assert f"# Dataset from `{tmp_path}/<b>'raw'/a.jsonl`" in text


def test_an_error_without_a_file_names_the_work_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(task: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kernels, "full", full, raising=False)
    with pytest.raises(StorageError, match=r"^preprocess: work folder /scratch/work: No space left on device"):
        list(engine.Engine("inline", 1).run("trainer.data.kernels:full", [{"work": "/scratch/work"}]))


def test_messages_never_show_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "SECRET\n' * 200)
    with pytest.raises(DataError) as error:
        preprocess(tmp_path / "out", path)
    assert "SECRET" not in str(error.value)


def test_manifest_is_of_a_dataset_and_records_the_python_of_a_builtin(tmp_path: Path) -> None:
    import platform

    dataset = preprocess(tmp_path / "out", "builtin:digits", "image")
    assert manifest.read(tmp_path / "out").kind == "dataset"
    assert dataset.meta["python"] == platform.python_version()
    assert_consistent(dataset)
    assert len(dataset.labels) == 10
    assert dataset.split("train").images.shape[1:] == (1, 8, 8)


def test_a_column_of_ids_is_no_label(tmp_path: Path) -> None:
    items = [{"text": f"words of row {row} {row * 7}", "label": f"id-{row}"} for row in range(50)]
    with pytest.raises(DataError, match=r"no label with .*; 50 labels are rarer") as error:
        preprocess(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", items))
    assert "column of ids" in error.value.hint
