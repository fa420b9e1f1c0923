"""Read the items of a JSON list one by one, however long the list is."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import DataError

_BLOCK = 1 << 16
MAX_ITEM = 64 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_LISTS = ("examples", "conversations", "data", "rows")
_HINT = "if each line is a JSON value, set data.format=jsonl or rename the file to .jsonl; else write one list per file"


def _whole_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)  # infinite, as 1e400 is


_STRICT, _LENIENT = json.JSONDecoder(), json.JSONDecoder(parse_int=_whole_number)


class _Buffer:
    """The part of a text file that is not yet parsed, and the line at which it starts."""

    def __init__(self, path: Path, name: str, encoding: str) -> None:
        self.name, self.encoding = name, encoding
        self.file = open(path, "rb")  # noqa: SIM115 - closed by items()
        self.decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding.lower() == "utf-8" else encoding)()
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def more(self, size: int = _BLOCK) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        block = self.file.read(size)
        try:
            self.ended = not block
            decoded = self.decoder.decode(block, self.ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.name}: line {self.line} or later: not {self.encoding.upper()} ({error.reason})",
                "set data.encoding",
            ) from None
        if not block and not decoded:
            return False
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :] + decoded, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def value(self) -> Any:
        """The next JSON value."""
        decoder, size = _STRICT, _BLOCK
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if len(self.text) - self.position > MAX_ITEM:
                    raise self.error(f"one item is longer than {MAX_ITEM >> 20} MiB") from None
                if not self.more(size):
                    raise self.error(error.msg, error.pos) from None
                size = min(size * 2, MAX_ITEM)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except ValueError:  # int() takes no number of more than 4300 digits
                decoder = _LENIENT
            else:
                # A number at the end of the buffer may go on in what is not read yet.
                if end < len(self.text) or not self.more(size):
                    self.position = end
                    return value

    def where(self, position: int | None = None) -> str:
        """The file and the line of a place in the buffer; by default the one that is read next."""
        line = self.line + self.text.count("\n", 0, self.position if position is None else position)
        return f"{self.name}: line {line}"

    def error(self, reason: str, position: int | None = None) -> DataError:
        return DataError(f"{self.where(position)}: not JSON ({reason})", f"correct the file; {_HINT}")

    def expect(self, character: str) -> None:
        """Step over a character."""
        found = self.peek()
        if found != character:
            raise self.error(
                f"{character!r} expected, found {found!r}" if found else f"{character!r} expected, the file ends"
            )
        self.position += 1

    def end(self) -> None:
        """Raises DataError if anything follows."""
        if self.peek():
            raise DataError(f"{self.where()}: more follows the end of the first JSON list or object", _HINT)


def items(path: Path, name: str, encoding: str) -> Iterator[Any]:
    """The items of a top-level list, or of the list under `examples`, `conversations`, `data` or `rows`.

    Args:
        path: the file.
        name: what errors call it.
        encoding: its character encoding.

    Raises:
        DataError: it is not JSON, holds no list or more than one; the message names the line.
    """
    buffer = _Buffer(path, name, encoding)
    with buffer.file:
        if buffer.peek() == "{":
            yield from _object(buffer)
        else:
            yield from _list(buffer)
        buffer.end()


def _list(buffer: _Buffer) -> Iterator[Any]:
    buffer.expect("[")
    if buffer.peek() != "]":
        yield buffer.value()
        while buffer.peek() == ",":
            buffer.expect(",")
            yield buffer.value()
    buffer.expect("]")


def _object(buffer: _Buffer) -> Iterator[Any]:
    """The items of the one list of rows in an object; other keys are stepped over."""
    buffer.expect("{")
    found = ""
    seen: list[str] = []
    while buffer.peek() == '"':
        key = buffer.value()
        seen.append(str(key)[:40])
        buffer.expect(":")
        if key not in _LISTS or buffer.peek() != "[":
            buffer.value()
        elif found:
            message = f"{buffer.where()}: a second list of rows, {key!r} after {found!r}"
            raise DataError(message, "write one list per file")
        else:
            found = key
            yield from _list(buffer)
        if buffer.peek() != ",":
            break
        buffer.expect(",")
    buffer.expect("}")
    if not found and not buffer.peek():
        message = f"{buffer.name}: holds no list of rows; its keys are {', '.join(seen[:10]) or 'none'}"
        raise DataError(message, f"put the rows in a list, or under one of {', '.join(_LISTS)}; {_HINT}")
