"""Read one chunk of a raw file row by row. A malformed row comes out as `Bad`; it never ends the chunk."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.examples import Bad
from trainer.errors import DataError

# A quoted CSV field may run over several lines; one that is longer than this was never closed.
MAX_RECORD = 8 << 20
csv.field_size_limit(MAX_RECORD)

# What json.loads calls in the end.
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

Numbered = tuple[int, Any]


def read(chunk: dict[str, Any], encoding: str) -> Iterator[Numbered]:
    """(line or row number, counted from 1; parsed row or Bad) for each row of a chunk, as `chunks.plan` made it.

    Raises:
        DataError: the file cannot be read at all.
    """
    path, form = Path(chunk["path"]), chunk["format"]
    if form == "parquet":
        return parquet_rows(path, chunk["groups"], chunk["first"], chunk.get("name", path.name))
    lines = text_lines(path, chunk["start"], chunk["end"], chunk["first"], encoding)
    if form == "jsonl":
        return json_rows(lines)
    if form == "text":
        return plain_rows(lines)
    return csv_rows(lines, chunk["header"], "\t" if form == "tsv" else ",")


def text_lines(path: Path, start: int, end: int, first: int, encoding: str) -> Iterator[tuple[int, str | Bad]]:
    """Numbered lines of a byte range, without line ends. Lines that are not in the encoding are Bad."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(end - start)
    if start == 0 and content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    try:
        lines: list[Any] = content.decode(encoding).split("\n")
    except UnicodeDecodeError:
        lines = [decode(line, encoding) for line in content.split(b"\n")]
    if lines and lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, first):
        yield number, line[:-1] if isinstance(line, str) and line.endswith("\r") else line


def decode(line: bytes, encoding: str) -> str | Bad:
    """A line as text, or Bad where it is not in the encoding."""
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return Bad("encoding", f"is not {encoding.upper()} (byte 0x{byte:02x} at position {error.start + 1})")


def json_rows(lines: Iterator[tuple[int, str | Bad]]) -> Iterator[Numbered]:
    """One JSON value per line; blank lines are skipped."""
    for number, line in lines:
        if isinstance(line, Bad):
            yield number, line
        elif line and not line.isspace():
            try:
                value, end = _scan(line, 0)
                if end == len(line):
                    yield number, value
                    continue
            except (ValueError, RecursionError, StopIteration):
                pass  # white space around it, or what json.loads says better
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, Bad("not_json", f"is not JSON ({error.msg} at character {error.pos + 1})")
            except RecursionError:
                yield number, Bad("not_json", "is not usable JSON (nested too deeply)")
            except ValueError:
                yield number, Bad("not_json", "is not usable JSON (a number has too many digits)")


def plain_rows(lines: Iterator[tuple[int, str | Bad]]) -> Iterator[Numbered]:
    """Each line that is not blank is a text."""
    for number, line in lines:
        if isinstance(line, Bad):
            yield number, line
        elif line and not line.isspace():
            yield number, {"text": line}


class _Unclosed(Exception):
    """A quoted field did not end within MAX_RECORD."""


class _Lines:
    """Lines handed to csv.reader one by one, remembering those of the record in progress so that they can be returned."""

    def __init__(self, lines: Iterator[tuple[int, str | Bad]]) -> None:
        self.lines = lines
        self.again: deque[tuple[int, str | Bad]] = deque()
        self.taken: list[tuple[int, str | Bad]] = []
        self.size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, line = self.again.popleft() if self.again else next(self.lines)
        self.taken.append((number, line))
        if isinstance(line, Bad):
            raise _Unclosed
        self.size += len(line)
        if self.size > MAX_RECORD:
            raise _Unclosed
        return line + "\n"

    def start(self) -> None:
        self.taken, self.size = [], 0

    def give_back(self) -> None:
        """Return all lines of the record but the first."""
        self.again.extendleft(reversed(self.taken[1:]))


def csv_records(lines: Iterator[tuple[int, str | Bad]], delimiter: str, width: int) -> Iterator[tuple[int, int, Any]]:
    """(first line, last line, fields or Bad) of each record; after a malformed one, reading goes on with its second line.

    Args:
        lines: numbered lines.
        delimiter: between fields.
        width: number of fields; 0 takes any.
    """
    source = _Lines(lines)
    # Strict: a quote that is opened by mistake shows at the next quote, and the rows between are read after all.
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        source.start()
        bad: Bad | None = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            if not source.taken:
                return
            bad = Bad("open_quote", "opens a quote that is never closed")
        except _Unclosed:
            first = source.taken[0][1]
            bad = first if isinstance(first, Bad) else Bad("open_quote", "opens a quote that is never closed")
        except csv.Error as error:
            if "end of data" in str(error):
                bad = Bad("open_quote", "opens a quote that is never closed")
            else:
                bad = Bad("not_csv", f"is not CSV ({error})")
        if not bad and not fields:
            continue
        if not bad and width and len(fields) != width:
            bad = Bad("field_count", f"has {len(fields)} fields, the header has {width}")
        if bad:
            source.give_back()
            yield source.taken[0][0], source.taken[0][0], bad
        else:
            yield source.taken[0][0], source.taken[-1][0], fields


def csv_rows(lines: Iterator[tuple[int, str | Bad]], header: list[str], delimiter: str) -> Iterator[Numbered]:
    """Records as objects with the header's names; a record is numbered by its first line."""
    for number, _, fields in csv_records(lines, delimiter, len(header)):
        yield number, fields if isinstance(fields, Bad) else dict(zip(header, fields, strict=True))


def parquet_rows(path: Path, groups: list[int], first: int, name: str) -> Iterator[Numbered]:
    """Rows of some row groups, numbered from `first`; `name` is what errors call the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = first
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, row_groups=groups):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{name}: row {number}: cannot be read: {' '.join(str(error).split())[:200]}"
        raise DataError(message, "the file is damaged; write it again") from None
