"""Markdown that shows what data says and cannot be changed by it: escaping, numbers and tables.

The Kubeflow Pipelines UI renders Markdown with markdown-to-jsx, other viewers with CommonMark and GitHub's tables; what is
written here reads the same in all of them. A text from data stands in a code span (`code`), in a sentence in which every
character that could be markup is escaped (`prose`), or in a fenced block (`block`), with no secret of a URI in it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from trainer.errors import redact

# What stands where there is no value.
NOTHING = "–"
_MARKUP = re.compile(r"([\\`*_\[\]{}<>#|~!&@$]|=(?==)|:(?=\S))")
# Bare addresses become links in most viewers.
_WWW = re.compile(r"(?i)\b(www)\.")


def code(value: Any, limit: int = 80) -> str:
    """A text of any origin as a code span on one line, cut off after `limit` characters.

    Nothing ends the span from inside: a backtick becomes an apostrophe and a bar, which would end the cell of a table,
    a broken bar.
    """
    text = clean(value, limit).replace("`", "'").replace("|", "¦")
    return f"`{text}`" if text else "(empty)"


def prose(value: Any, limit: int = 400) -> str:
    """A text of any origin as words of a sentence, with all that could be markup, HTML or a link escaped."""
    return _WWW.sub(r"\1\\.", _MARKUP.sub(r"\\\1", clean(value, limit)))


def block(value: Any, lines: int = 20) -> str:
    """A text of several lines of any origin as a fenced block, cut off after `lines` lines."""
    found = [clean(line, 300, keep_indent=True) for line in str(value).splitlines()]
    if len(found) > lines:
        found = [*found[:lines], f"… {len(found) - lines:,} more lines"]
    inside = "\n".join(found).replace("```", "'''")
    return f"```text\n{inside}\n```"


def clean(value: Any, limit: int, *, keep_indent: bool = False) -> str:
    """A text on one line, without control and format characters and secrets, at most `limit` characters long."""
    text = redact(str(value)).encode("utf-8", "replace").decode()
    indent = len(text) - len(text.lstrip(" ")) if keep_indent else 0
    # Format characters turn the direction of what follows them, or show nothing where there is something.
    text = " ".join("".join(" " if _is_hidden(each) else each for each in text).split())
    text = " " * min(indent, 8) + text if text else ""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_hidden(character: str) -> bool:
    # Zero-width joiners are spelling in some scripts.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and character not in "\u200c\u200d"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A figure for people: whole numbers with thousands separators, others with `digits` digits that count."""
    if not is_number(value):
        return NOTHING
    if float(value).is_integer() and (isinstance(value, int) or abs(value) >= 1000):
        return f"{value:,.0f}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def score(value: Any) -> str:
    """A score or a loss, with four decimals."""
    if not is_number(value):
        return NOTHING
    return f"{value:,.4f}"


def share(value: Any) -> str:
    """A share between 0 and 1 in percent."""
    if not is_number(value):
        return NOTHING
    return f"{100 * value:.1f} %"


def size(value: Any) -> str:
    """A number of bytes, as people say it: 512 B, 1.3 MB."""
    if not is_number(value):
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds(value: Any) -> str:
    """A duration: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if not is_number(value):
        return NOTHING
    if value < 59.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    whole = int(value + 0.5)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole // 60 % 60:02d} min"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are flush left and the others, figures, flush right.

    Cells are Markdown already; a column, but the first, in which no row has a value is left out.
    """
    kept = [i for i in range(len(head)) if not i or any(row[i] not in ("", NOTHING) for row in rows)]
    rule = [":---" if i < left else "---:" for i in kept]
    lines = [[_apart(i, cells[i]) for i in kept] for cells in (head, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _apart(column: int, cell: str) -> str:
    # The UI sets the columns of a table with no space between them.
    return f"&nbsp;&nbsp;{cell}" if column else cell or " "


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; nothing where there is nothing to say."""
    body = "\n\n".join(part for part in parts if part)
    return f"## {title}\n\n{body}" if body else ""


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)
