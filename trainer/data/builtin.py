"""Raw data that is on every machine already: nothing is downloaded.

    python -m trainer.data.builtin NAME --out FILE

writes a built-in source as JSON lines. `data.source: builtin:NAME` uses one directly.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.errors import ConfigError, DataError, MillraceError

Row = dict[str, Any]

_SKIPPED = frozenset(("test", "tests", "idle_test", "lib2to3", "site-packages", "encodings", "__pycache__"))
_MIN_FUNCTIONS = 100
_DEF = re.compile(rb"^[ \t]*(?:async[ \t]+)?def[ \t]", re.MULTILINE)


def stdlib_files() -> list[Path]:
    """The modules of this Python's standard library, without tests and generated tables, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        # In place: os.walk then does not enter them (site-packages alone can hold 100,000 files).
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith("config-")]
        found += [(Path(folder) / name).relative_to(root) for name in names if name.endswith(".py")]
    return sorted(found)


def stdlib_functions() -> Iterator[Row]:
    """Functions and methods of the standard library, labelled by top-level module or package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    groups: dict[str, list[Path]] = {}
    for path in stdlib_files():
        groups.setdefault(path.parts[0].removesuffix(".py"), []).append(path)
    for label, paths in groups.items():
        contents = [(root / path).read_bytes() for path in paths]
        if sum(len(_DEF.findall(content)) for content in contents) < _MIN_FUNCTIONS:
            continue
        texts = [text for content in contents for text in _functions(content)]
        if len(texts) >= _MIN_FUNCTIONS:
            yield from ({"text": text, "label": label} for text in texts)


def _functions(content: bytes) -> Iterator[str]:
    """Functions of a module and methods of its classes, dedented, in the order of the source."""
    try:
        source = content.decode()
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    waiting: list[ast.stmt] = list(reversed(tree.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield textwrap.dedent("".join(lines[start - 1 : node.end_lineno]))
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
            waiting.extend(reversed(node.body))


def stdlib_modules() -> Iterator[Row]:
    """Whole modules of the standard library, for the language model of code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_files():
        try:
            text = (root / path).read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield {"text": text, "label": path.parts[0].removesuffix(".py"), "file": path.as_posix()}


# Sections that say what role a package plays rather than what it is about.
_ROLES = "libs libdevel oldlibs doc debug devel metapackages tasks introspection debian-installer misc"
_ROLE_SECTIONS = frozenset(_ROLES.split())


def debian_sections() -> Iterator[Row]:
    """Synopses of Debian packages, labelled by archive section; a synopsis that occurs twice is used once."""
    fix = "run `apt-get update`, or use another data.source"
    try:
        done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        raise DataError("builtin:debian-sections: apt-cache cannot be run on this machine", fix) from None
    found: dict[str, str] = {}
    clashing: set[str] = set()
    for paragraph in done.stdout.decode("utf-8", "replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.split("\n") if line[:1].strip() and ": " in line)
        section = fields.get("Section", "").rpartition("/")[2]
        synopsis = fields.get("Description", fields.get("Description-en", "")).strip()
        if not synopsis or not section or section in _ROLE_SECTIONS:
            continue
        if found.setdefault(synopsis, section) != section:
            clashing.add(synopsis)
    if not found:
        raise DataError("builtin:debian-sections: this machine has no apt package lists", fix)
    for synopsis in sorted(found.keys() - clashing):
        yield {"text": synopsis, "label": found[synopsis]}


def digits() -> Iterator[Row]:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels in 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        message = "builtin:digits: comes with scikit-learn, which is not installed here (the image data has none)"
        raise DataError(message, "pip install scikit-learn, or use another data.source") from None
    data = load_digits()
    scaled = (data.images * 255 / 16).round().astype(int)
    for image, target in zip(scaled, data.target, strict=True):
        yield {"image": image.tolist(), "label": str(target)}


@dataclass(frozen=True)
class Builtin:
    """A built-in source: its rows, and what it is."""

    rows: Callable[[], Iterator[Row]]
    help: str


SOURCES: dict[str, Builtin] = {
    "stdlib-functions": Builtin(stdlib_functions, "functions of Python's standard library -> package"),
    "stdlib-modules": Builtin(stdlib_modules, "whole modules of Python's standard library, for language models"),
    "debian-sections": Builtin(debian_sections, "synopses of Debian packages -> archive section (needs apt lists)"),
    "digits": Builtin(digits, "scikit-learn's scans of handwritten digits"),
}


def write(name: str, path: Path) -> None:
    """Write a built-in source as JSON lines.

    Raises:
        ConfigError: there is no source of this name.
        DataError: this machine does not have its data.
    """
    from trainer.config.names import nearest

    if name not in SOURCES:
        raise ConfigError(
            f"builtin:{name}: no such source; {nearest(name, SOURCES)}", f"use one of {', '.join(SOURCES)}"
        )
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in SOURCES[name].rows())
    storage.write_atomic(path, content.encode())


def describe() -> dict[str, Any]:
    """What the built-in sources depend on, for the manifest."""
    return {"python": platform.python_version()}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.data.builtin", description="Write a built-in source.")
    parser.add_argument(
        "name", metavar="NAME", help=", ".join(f"{key} ({value.help})" for key, value in SOURCES.items())
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="file of JSON lines to write")
    args = parser.parse_args(argv)
    try:
        write(args.name, args.out)
    except MillraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
