"""The name in the registry of a model of data that has no name given to it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def model_name(source: str) -> str:
    """The name in the registry of a model of this data, made from the data's own name."""
    stem = Path(source.rstrip("/")).stem.removeprefix("builtin:").lower()
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:50].strip("-")
    if name and not any(char.isalnum() and not char.isascii() for char in stem):
        return name
    # Names in other scripts would all become the same one, and share a registry entry.
    known_by = stem if any(map(str.isalnum, stem)) else source
    return f"{name or 'data'}-{hashlib.sha256(known_by.encode(errors='surrogateescape')).hexdigest()[:8]}"
