"""What is complete below a run's folder, and the small JSON files of it that a person wants to see.

An object store is asked in a process of its own: its driver would stay in the memory of a coordinator that waits.
"""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

from components.launch import apart
from trainer import storage
from trainer.errors import MillraceError

# Artifact -> files beside its manifest.
FILES = {"tuning": ("best.json",), "evaluation": ("metrics.json",), "promotion": ("promotion.json",)}
PAGE = "evaluation/report.html"
# A page of this size still travels in the coordinator's output.
_PAGE_BYTES = 400_000


def facts(uri: str, port: str) -> dict[str, Any] | None:
    """Path below the run -> content of an artifact's small files; None if it is not complete.

    Args:
        uri: of the artifact's folder.
        port: its name.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    target = "components.launch.chain_facts:read"
    found: dict[str, Any] | None = apart.call(target, uri, port) if storage.is_remote(uri) else read(uri, port)
    return found


def read(uri: str, port: str) -> dict[str, Any] | None:
    """The same, in this process."""
    if not storage.exists(f"{uri}/{storage.MANIFEST}"):
        return None
    content = json.loads(storage.read_bytes(f"{uri}/{storage.MANIFEST}"))
    record = {"metrics": (content.get("record") or {}).get("metrics") or {}}
    kept = {"digest": content.get("digest"), "meta": content.get("meta"), "record": record}
    found: dict[str, Any] = {f"{port}/{storage.MANIFEST}": kept}
    for name in FILES.get(port, ()):
        found[f"{port}/{name}"] = json.loads(storage.read_bytes(f"{uri}/{name}"))
    if port == "evaluation":
        page = _packed(f"{uri}/report.html")
        found |= {PAGE: page} if page else {}
    return found


def _packed(uri: str) -> str:
    try:
        content = gzip.compress(storage.read_bytes(uri), mtime=0)
    except MillraceError:
        return ""
    return base64.b64encode(content).decode() if len(content) <= _PAGE_BYTES else ""


def unpacked(text: str) -> bytes:
    """The page of which `facts` holds the text.

    Raises:
        ValueError: it is none.
    """
    try:
        return gzip.decompress(base64.b64decode(text, validate=True))
    except (OSError, EOFError) as error:
        raise ValueError(str(error)) from None
