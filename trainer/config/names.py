"""Nearest-name help, used wherever a person types a name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase such as `did you mean 'lr'?`, or the list of the known names when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def one_of(table: Iterable[str]) -> Callable[[str], str]:
    """A pydantic validator that accepts only names of the table."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"{name!r} is not known; {nearest(name, table)}")
        return name

    return check
