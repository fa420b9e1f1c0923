"""What a registry holds, to compare two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMES = ("time", "created", "seal")


def registry_of(root: Path) -> dict[str, Any]:
    """All that the registry in a local folder holds, by name, but for times and the seals that cover them.

    Files of a version are bytes, records are their fields. Hidden names are locks and what killed processes left: no
    reader looks at them.
    """
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        body: Any = path.read_bytes()
        if name.parts[1] != "versions" or name.name == "version.json":
            body = {key: value for key, value in json.loads(body).items() if key not in TIMES}
        found[name.as_posix()] = body
    return found
