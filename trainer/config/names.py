"""Nearest-name help, used wherever a person types a name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase such as `did you mean 'lr'?`, or the list of the known names when none is near."""
    names = {known_name.lower(): known_name for known_name in sorted(known)}
    close = difflib.get_close_matches(name[:80].lower(), list(names), n=1, cutoff=0.5)
    return f"did you mean {names[close[0]]!r}?" if close else f"known: {', '.join(names.values())}"


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
