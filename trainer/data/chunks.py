"""Cut raw files into chunks that workers read on their own, without holding a file in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.names import nearest
from trainer.data.examples import MAX_NAMES, Bad, to_example
from trainer.data.json_stream import items
from trainer.data.readers import csv_records, decode, json_rows
from trainer.data.sources import RawFile
from trainer.errors import ConfigError, DataError

CHUNK_BYTES = 16 << 20
MAX_LINE = 256 << 20
_BLOCK = 1 << 20
_IMAGES_PER_CHUNK = 2048
_DELIMITERS = {"\t": "tab", ";": "semicolon", ",": "comma", "|": "vertical bar"}

Chunk = dict[str, Any]


def plan(files: list[RawFile], encoding: str, keys: tuple[str, str], task: str, work: Path) -> list[Chunk]:
    """Chunks of all files, in order.

    Args:
        files: raw files.
        encoding: of text files.
        keys: names of the text and of the label column.
        task: as task.name.
        work: folder for what has to be rewritten first (JSON lists, UTF-16).

    Raises:
        DataError: a file cannot be read, or lacks a column.
        ConfigError: the encoding is not known.
    """
    wide = is_wide(encoding)
    chunks: list[Chunk] = []
    for number, file in enumerate(files):
        path = file.path
        if wide and file.format != "parquet":
            path = _transcoded(file, encoding, work / f"utf8-{number}")
        if file.format == "json":
            path = _as_lines(path, file.name, "utf-8" if wide else encoding, work / f"lines-{number}.jsonl")
        found = _plan_file(RawFile(path, file.name, file.format), "utf-8" if wide else encoding, keys, task)
        chunks += [{"path": str(path), "name": file.name, "file": number, **chunk} for chunk in found]
    return chunks


def check_columns(file: RawFile, encoding: str, keys: tuple[str, str], task: str) -> None:
    """Check that the first row of a raw file has the columns or keys that are named, without reading the rest.

    Raises:
        DataError: it has not; the message names the nearest.
    """
    if file.format == "parquet":
        _parquet(file, keys, task)
    elif is_wide(encoding):
        return  # it has to be rewritten first
    elif file.format in ("csv", "tsv"):
        delimiter = "\t" if file.format == "tsv" else ","
        record = next(csv_records(_sized_lines(file.path, encoding, {}), delimiter, 0), None)
        if record:
            _header(file.name, record[2], delimiter, keys, task)
    elif file.format in ("jsonl", "json"):
        rows = items(file.path, file.name, encoding) if file.format == "json" else _first_json(file, encoding)
        found = to_example(next(iter(rows), {}), *keys, task)
        if isinstance(found, Bad):
            raise DataError(
                f"{file.name}: row 1: {found.message}",
                "set data.text and data.label to the keys of the text and of the label",
            )


def _first_json(file: RawFile, encoding: str) -> Iterator[Any]:
    for _, row in json_rows((number, line) for number, line in _sized_lines(file.path, encoding, {})):
        if not isinstance(row, Bad):  # damaged rows are counted when all is read
            yield row


def _plan_file(file: RawFile, encoding: str, keys: tuple[str, str], task: str) -> list[Chunk]:
    if file.format == "parquet":
        return _parquet(file, keys, task)
    if file.format in ("csv", "tsv", "images"):
        return _csv(file, encoding, keys, task)
    if file.format == "text" and task != "lm":
        raise DataError(f"{file.name}: plain text has no labels", "set task.name=lm, or give a CSV with a label column")
    form = "jsonl" if file.format == "json" else file.format
    return [
        {"format": form, "start": start, "end": end, "first": first}
        for start, end, first in line_ranges(file.path, file.name)
    ]


def line_ranges(path: Path, name: str = "") -> Iterator[tuple[int, int, int]]:
    """(start byte, end byte, number of the first line) of chunks of whole lines; `name` is what errors call the file."""
    start = position = line_start = 0
    first = line = 1
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            cut = block.find(b"\n") + 1
            if cut and position + cut - start >= CHUNK_BYTES:
                end = position + cut
                yield start, end, first
                start, first = end, line + 1
            line += block.count(b"\n")
            if cut:
                line_start = position + block.rfind(b"\n") + 1
            position += len(block)
            if position - line_start > MAX_LINE:
                raise DataError(
                    f"{name or path.name}: line {line}: longer than {MAX_LINE} bytes", "write one row per line"
                )
    if position > start:
        yield start, position, first


def is_wide(encoding: str) -> bool:
    """Whether lines cannot be found byte by byte in this encoding (UTF-16), so that files are rewritten as UTF-8 first."""
    try:
        codecs.lookup(encoding)
        return "a,\n".encode(encoding) != b"a,\n" and encoding.lower().replace("_", "-") != "utf-8-sig"
    except (LookupError, UnicodeError):
        raise ConfigError(f"data.encoding: {encoding!r} is not known", "for example utf-8, latin-1, utf-16") from None


def _transcoded(file: RawFile, encoding: str, path: Path) -> Path:
    """A copy in UTF-8 of a file whose lines cannot be found byte by byte (UTF-16)."""
    try:
        with (
            open(file.path, encoding=encoding, newline="") as source,
            open(path, "w", encoding="utf-8", newline="") as out,
        ):
            while text := source.read(_BLOCK):
                out.write(text)
    except UnicodeError as error:
        raise DataError(f"{file.name}: not {encoding}: {error}", "set data.encoding to the file's encoding") from None
    return path


def _as_lines(path: Path, name: str, encoding: str, target: Path) -> Path:
    """A copy of a JSON list with one item per line; rows are then numbered by their place in the list."""
    with open(target, "w", encoding="utf-8") as out:
        for item in items(path, name, encoding):
            out.write(json.dumps(item) + "\n")
    if not target.stat().st_size:
        raise DataError(f"{name}: the list is empty", "give it rows")
    return target


def _check_columns(name: str, columns: list[str], keys: tuple[str, str], task: str) -> None:
    text, label = keys
    for key, field in ((text, "text"), (label, "label")):
        if key not in columns and not (key == label and task == "lm"):
            message = f"{name}: no column {key!r}; {nearest(key, columns, limit=MAX_NAMES)}"
            raise DataError(message, f"set data.{field} to the name of a column; does the file have a header line?")


def _check_delimiter(name: str, header: list[str], delimiter: str) -> None:
    """Raises DataError for a header of one column in which another delimiter stands."""
    others = [each for each in _DELIMITERS if each != delimiter and each in header[0]] if len(header) == 1 else []
    if others:
        message = f"{name}: line 1: the header has no {_DELIMITERS[delimiter]} but a {_DELIMITERS[others[0]]}"
        fixes = {"\t": "set data.format=tsv", ",": "set data.format=csv"}
        raise DataError(message, fixes.get(others[0], "write the file with commas, or with tabs as .tsv"))


def _csv(file: RawFile, encoding: str, keys: tuple[str, str], task: str) -> list[Chunk]:
    """Chunks of whole records: line ends inside quotes mean that only a CSV reader can tell where records end."""
    delimiter = "\t" if file.format == "tsv" else ","
    sizes: dict[int, int] = {}
    header: list[str] | None = None
    chunks: list[Chunk] = []
    start, first, rows, limit = 0, 1, 0, _IMAGES_PER_CHUNK if file.format == "images" else 0
    end = done = 0
    whole = file.path.stat().st_size
    for _, last, fields in csv_records(_sized_lines(file.path, encoding, sizes), delimiter, 0):
        if header is None:
            header = _header(file.name, fields, delimiter, keys, task)
            end = start = _end_of(sizes, 0, last)
            first, done = last + 1, last
            if whole <= CHUNK_BYTES and not limit:
                end = whole
                break
            continue
        rows += 1
        end, done = _end_of(sizes, done, last), last
        if end - start >= CHUNK_BYTES or (limit and rows >= limit):
            chunks.append({"start": start, "end": end, "first": first})
            start, first, rows = end, last + 1, 0
    if header is None or (not chunks and end == start):
        raise DataError(f"{file.name}: there is a header but no row", "give it rows")
    if end > start or whole > start:
        chunks.append({"start": start, "end": whole, "first": first})
    return [{"format": file.format, "header": header, **chunk} for chunk in chunks]


def _end_of(ends: dict[int, int], done: int, last: int) -> int:
    """The byte at which line `last` ends; forgets the lines after `done` up to it, which are not asked for again."""
    end = 0
    for line in range(done + 1, last + 1):
        end = ends.pop(line)
    return end


def _header(name: str, fields: Any, delimiter: str, keys: tuple[str, str], task: str) -> list[str]:
    if isinstance(fields, Bad):
        hint = f"correct the header (fields are divided by a {_DELIMITERS[delimiter]}), or set data.encoding"
        raise DataError(f"{name}: line 1: {fields.message}", hint)
    header = [column.strip() for column in fields]
    if not set(keys) & set(header):
        _check_delimiter(name, fields, delimiter)
    _check_columns(name, header, keys, task)
    if len(set(header)) != len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise DataError(f"{name}: line 1: column {twice[:40]!r} appears twice", "rename one of them")
    return header


def _sized_lines(path: Path, encoding: str, ends: dict[int, int]) -> Iterator[tuple[int, Any]]:
    """Numbered lines; `ends` gets the byte at which each line ends."""
    position = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            position += len(raw)
            ends[number] = position
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            yield number, decode(line.rstrip(b"\n").removesuffix(b"\r"), encoding)


def _parquet(file: RawFile, keys: tuple[str, str], task: str) -> list[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as parquet:
            columns = list(parquet.schema_arrow.names)
            sizes = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
            groups = [(group.num_rows, group.total_byte_size) for group in sizes]
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file.name}: not a complete Parquet file ({reason})", "write the file again") from None
    if keys[0] in columns or not {"input", "messages"} & set(columns):
        _check_columns(file.name, columns, keys, task)
    if not sum(rows for rows, _ in groups):
        raise DataError(f"{file.name}: the file has no rows", "give it rows")
    chunks: list[Chunk] = []
    first, size = 1, CHUNK_BYTES
    for number, (rows, num_bytes) in enumerate(groups):
        if size >= CHUNK_BYTES:
            chunks.append({"format": "parquet", "groups": [], "first": first, "start": 0, "end": 0})
            size = 0
        chunks[-1]["groups"].append(number)
        chunks[-1]["end"] += num_bytes
        first += rows
        size += num_bytes
    return chunks
