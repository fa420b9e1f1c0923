"""Nearest-name help, used wherever a person types a name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

_MAX_NAME = 40


def nearest(name: str, known: Iterable[str], limit: int = 0) -> str:
    """A phrase such as `did you mean 'lr'?`, or the list of the known names when none is near.

    Args:
        name: as it was typed.
        known: the names it can be.
        limit: list at most so many and cut each: for names that come out of a file, and may be its data.
    """
    if limit:
        known = [" ".join(known_name[:_MAX_NAME].split()) for known_name in known]
    names = {known_name.lower(): known_name for known_name in sorted(known)}
    close = difflib.get_close_matches(name[:80].lower(), list(names), n=1, cutoff=0.5)
    if close:
        return f"did you mean {names[close[0]]!r}?"
    listed = list(names.values())[: limit or None]
    more = f" and {len(names) - len(listed)} more" if len(listed) < len(names) else ""
    return f"known: {', '.join(listed)}{more}"


def shown(name: Any) -> str:
    """A name of the user's as it may stand in an error: quoted if it is odd, cut if it is long."""
    text = str(name)
    return text if re.fullmatch(r"[\w.-]{1,80}", text) else repr(name[:80] if isinstance(name, str) else name)[:90]


def one_of(table: Iterable[str]) -> Callable[[str], str]:
    """A pydantic validator that accepts only names of the table."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"{name!r} is not known; {nearest(name, table)}")
        return name

    return check
