"""Readers: every format, malformed rows with their line numbers, and chunks that cover a file exactly."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import chunks, json_stream
from trainer.data.examples import Bad, Example, to_example
from trainer.data.readers import csv_records, read
from trainer.data.sources import RawFile, resolve
from trainer.errors import ConfigError, DataError

cells = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=12)


def rows_of(path: Path, tmp_path: Path, task: str = "classify", encoding: str = "utf-8") -> list[tuple[int, Any]]:
    source = resolve(str(path), "auto", tmp_path)
    plan = chunks.plan(source.files, encoding, ("text", "label"), task, tmp_path)
    return [row for chunk in plan for row in read(chunk, "utf-8" if chunks.is_wide(encoding) else encoding)]


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=12))
def test_csv_with_any_quoting_comes_back_as_written(pairs: list[tuple[str, str]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(pairs)
    lines = enumerate(out.getvalue().replace("\r\n", "\n").split("\n")[:-1], 1)
    found = [tuple(fields) for _, _, fields in csv_records(lines, ",", 2)]
    assert found == pairs


@given(st.lists(st.tuples(cells, cells), min_size=2, max_size=20), st.integers(40, 200))
def test_chunks_of_a_csv_never_cut_a_record(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    path = folder / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *pairs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", size)
        found = rows_of(path, folder)
    assert [(row["text"], row["label"]) for _, row in found] == pairs


@given(st.binary(min_size=1, max_size=400), st.integers(1, 60), st.integers(1, 50))
def test_line_ranges_cover_a_file_and_count_its_lines(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, size: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", size)
        patch.setattr(chunks, "_BLOCK", block)
        ranges = list(chunks.line_ranges(path))
    assert [start for start, _, _ in ranges] == [0, *(end for _, end, _ in ranges[:-1])]
    assert ranges[-1][1] == len(content)
    for start, _, first in ranges:
        assert start == 0 or content[start - 1 : start] == b"\n"
        assert first == content[:start].count(b"\n") + 1


CSV = {
    "too few fields": (b"text,label\na,x\nonly\nb,y\n", [2, 4], {3: "field_count"}),
    "too many fields": (b"text,label\na,x,1\nb,y\n", [3], {2: "field_count"}),
    "quoted line end": (b'text,label\n"a\nb",x\nc,y\n', [2, 4], {}),
    "doubled quote": (b'text,label\n"a ""b""",x\n', [2], {}),
    "inch sign": (b'text,label\n5" disk,x\nb,y\n', [2, 3], {}),
    "quote never closed": (b'text,label\n"open,x\nb,y\nc,z\n', [3, 4], {2: "open_quote"}),
    "quote closed too late": (b'text,label\n"open,x\nb,y\n"c",z\nd,w\n', [3, 4, 5], {2: "not_csv"}),
    "not UTF-8": (b"text,label\ncaf\xe9,x\nb,y\nc,y\nd,y\ne,y\n", [3, 4, 5, 6], {2: "encoding"}),
    "byte order mark": (b"\xef\xbb\xbftext,label\na,x\n", [2], {}),
    "windows line ends": (b"text,label\r\na,x\r\n", [2], {}),
    "blank lines": (b"text,label\n\na,x\n\n", [3], {}),
    "no line end at the end": (b"text,label\na,x", [2], {}),
}


@pytest.mark.parametrize("name", CSV)
def test_csv_rows_by_line(name: str, tmp_path: Path) -> None:
    content, good, bad = CSV[name]
    (tmp_path / "a.csv").write_bytes(content)
    found = rows_of(tmp_path / "a.csv", tmp_path)
    assert [line for line, row in found if not isinstance(row, Bad)] == good
    assert {line: row.kind for line, row in found if isinstance(row, Bad)} == bad
    assert not [row for _, row in found if isinstance(row, dict) and any("\r" in value for value in row.values())]


JSONL = {
    "not JSON": (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', [1, 3], {2: "not_json"}),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', [1], {2: "encoding"}),
    "blank lines": (b'\n{"text": "a"}\n\n', [2], {}),
    "deep": (b"[" * 100_000 + b'\n{"text": "a"}\n', [2], {1: "not_json"}),
    "huge number": (b'{"text": ' + b"9" * 10_000 + b'}\n{"text": "a"}\n', [2], {1: "not_json"}),
    "line separator inside": ('{"text": "a\u2028b"}\n'.encode(), [1], {}),
}


@pytest.mark.parametrize("name", JSONL)
def test_json_lines_by_line(name: str, tmp_path: Path) -> None:
    content, good, bad = JSONL[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    found = rows_of(tmp_path / "a.jsonl", tmp_path)
    assert [line for line, row in found if not isinstance(row, Bad)] == good
    assert {line: row.kind for line, row in found if isinstance(row, Bad)} == bad


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(values, max_size=12), st.integers(1, 30), st.sampled_from([None, 2]), st.booleans())
def test_json_list_is_read_item_by_item(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], block: int, indent: int | None, wrapped: bool
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps({"version": 1.5, "examples": items} if wrapped else items, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_BLOCK", block)
        assert list(json_stream.items(path, "a.json", "utf-8")) == items


BROKEN = {
    "truncated": (b'[{"text": "a"},\n {"text": "b', "line 2"),
    "no comma": (b"[1\n2]", "line 2"),
    "not a list": (b'"text"', "line 1"),
    "no list inside": (b'{"a": 1}', "holds no list"),
    "not UTF-8": (b'["\xff\xff"]', "not UTF-8"),
    "nothing": (b"  ", "the file ends"),
    "comma at the end": (b"[1,]", "line 1"),
    "two lists": (b"[1, 2]\n[3]", "line 2: more follows the end"),
    "garbage after": (b"[1]\n\n x", "line 3: more follows the end"),
    "objects with lists": (b'{"data": [1, 2], "label": "x"}\n{"data": [3]}', "line 2: more follows the end"),
    "two keys with lists": (b'{"examples": [1],\n"data": [2]}', "line 2: a second list of rows, 'data' after 'examples'"),
    "a key with two lists": (b'{"data": [],\n"data": [2]}', "line 2: a second list of rows"),
    "object not closed": (b'{"data": [1]', "the file ends"),
    "JSON lines": (b'{"text": "a"}\n{"text": "b"}', "line 2: more follows the end"),
    "deep": (b"[" * 100_000, "line 1: not JSON .nested too deeply"),
}  # fmt: skip
JSON_LINES = {"two lists", "objects with lists", "JSON lines"}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_names_the_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(json_stream.items(tmp_path / "a.json", "a.json", "utf-8"))
    if name in JSON_LINES:
        assert "data.format=jsonl" in error.value.hint


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_keys_after_the_list_are_stepped_over(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    (tmp_path / "a.json").write_text('{"v": 1, "rows": [1, 2], "license": {"rows": [3]}, "data": null}\n \n')
    assert list(json_stream.items(tmp_path / "a.json", "a.json", "utf-8")) == [1, 2]


@pytest.mark.parametrize("label", ["9" * 5000, "-" + "9" * 5000, "1e400", "NaN", "-Infinity"])
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_label_that_is_no_number_is_one_malformed_row(form: str, label: str, tmp_path: Path) -> None:
    lines = ['{"text": "a", "label": 1}', f'{{"text": "b", "label": {label}}}', '{"text": "c", "label": 1.0}']
    (tmp_path / f"a.{form}").write_text("[" + ",\n".join(lines) + "]" if form == "json" else "\n".join(lines))
    found = [row for _, row in rows_of(tmp_path / f"a.{form}", tmp_path)]
    examples = [row if isinstance(row, Bad) else to_example(row, "text", "label", "classify") for row in found]
    assert examples[::2] == [Example("a", "1"), Example("c", "1.0")]
    assert isinstance(examples[1], Bad)
    assert examples[1].kind in ("no_label", "not_json")
    assert "Error" not in examples[1].message


def test_planning_a_csv_of_long_records_keeps_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    def watched(path: Path, encoding: str, ends: dict[int, int]) -> Any:
        for line in sized_lines(path, encoding, ends):
            left.append(len(ends))
            yield line

    sized_lines = chunks._sized_lines
    monkeypatch.setattr(chunks, "_sized_lines", watched)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    (tmp_path / "a.csv").write_text('"text","la\nbel",label\n\n' + '"a\nb\nc","\n",x\n\n"a"b,x,y\n' * 3000)
    found = rows_of(tmp_path / "a.csv", tmp_path)
    assert len(found) == 6000
    assert len(left) > 18_000
    assert max(left) < 10


SHAPES = {
    "text": ({"text": "a", "label": "x"}, "classify", Example("a", "x")),
    "number as label": ({"text": "a", "label": 3}, "classify", Example("a", "3")),
    "truth as label": ({"text": "a", "label": True}, "classify", Example("a", "true")),
    "label is trimmed": ({"text": "a", "label": " two  words "}, "classify", Example("a", "two words")),
    "lm needs no label": ({"text": "a"}, "lm", Example("a", None)),
    "pair": ({"input": "q", "output": "a"}, "lm", Example("<|user|>\nq\n<|assistant|>\na", None)),
    "pair as classes": ({"input": "q", "output": "yes"}, "classify", Example("q", "yes")),
    "dialogue": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "lm",
        Example("<|user|>\nq\n<|assistant|>\na", None),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_rows(name: str) -> None:
    row, task, expected = SHAPES[name]
    assert to_example(row, "text", "label", task) == expected


MALFORMED: dict[str, tuple[Any, str, str]] = {
    "list": ([1], "not_object", "list"),
    "null": (None, "not_object", "null"),
    "no text": ({"txt": "a", "label": "x"}, "no_text", "did you mean 'txt'"),
    "no label": ({"text": "a", "lable": "x"}, "no_label", "did you mean 'lable'"),
    "null label": ({"text": "a", "label": None}, "no_label", "null"),
    "empty label": ({"text": "a", "label": " "}, "no_label", "empty"),
    "list as label": ({"text": "a", "label": []}, "no_label", "list"),
    "NaN as label": ({"text": "a", "label": float("nan")}, "no_label", "NaN or infinite"),
    "infinite label": ({"input": "a", "output": float("-inf")}, "no_label", "NaN or infinite"),
    "long label": ({"text": "a", "label": "x" * 300}, "long_label", "300"),
    "number as text": ({"text": 1, "label": "x"}, "text_not_string", "number"),
    "half a surrogate pair": ({"text": "\ud800", "label": "x"}, "encoding", "surrogate"),
    "dialogue for a classifier": ({"messages": []}, "no_label", "task.name=lm"),
    "pair of numbers": ({"input": 1, "output": 2}, "text_not_string", "input"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_say_why(name: str) -> None:
    row, kind, message = MALFORMED[name]
    found = to_example(row, "text", "label", "classify")
    assert isinstance(found, Bad)
    assert found.kind == kind
    assert message in found.message


def test_a_turn_that_is_no_number_is_malformed() -> None:
    row = {"input": "a", "output": float("nan")}
    assert isinstance(to_example(row, "text", "label", "lm"), Bad)


def test_a_message_names_few_keys_and_cuts_them() -> None:
    row = {f"{number:02d} SECRET " + "words " * 40: 1 for number in range(50)}
    found = to_example(row, "text", "label", "classify")
    assert isinstance(found, Bad)
    assert found.message.count("SECRET") == 12
    assert "and 38 more" in found.message
    assert len(found.message) < 700


@given(values, st.sampled_from(["classify", "lm", "image"]))
def test_any_json_value_is_an_example_or_malformed(row: Any, task: str) -> None:
    assert isinstance(to_example(row, "text", "label", task), Bad | Example)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig", "cp1252", "utf-32"])
def test_other_encodings(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"caf\xe9,\n bar",x\nb,y\n', encoding=encoding)
    found = rows_of(tmp_path / "a.csv", tmp_path, encoding=encoding)
    assert [(line, row["text"]) for line, row in found] == [(2, "caf\xe9,\n bar"), (4, "b")]


def test_unknown_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.encoding: 'utf-9'"):
        chunks.plan([RawFile(tmp_path, "a", "csv")], "utf-9", ("text", "label"), "classify", tmp_path)


def test_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_LINE", 1000)
    monkeypatch.setattr(chunks, "_BLOCK", 100)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b"x" * 5000)
    with pytest.raises(DataError, match="line 2: longer than 1000 bytes"):
        list(chunks.line_ranges(tmp_path / "a.jsonl"))


def test_parquet_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"t{i}" for i in range(25)], "label": pa.array([i % 2 for i in range(25)])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
    found = rows_of(tmp_path / "a.parquet", tmp_path)
    assert [(number, row["text"]) for number, row in found] == [(i + 1, f"t{i}") for i in range(25)]
