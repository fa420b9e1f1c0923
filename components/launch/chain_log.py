"""What the coordinator of a run prints: lines for people, and between them events for the terminal that follows.

    :: {"event": "running", "stage": "train", "at": 1795600000.0}
    train: step 40/200 loss 1.21
    :: {"event": "done", "stage": "train", "at": 1795600042.5, "facts": {"model/manifest.json": {...}}}

`facts` holds the small JSON files of what a stage made, from which the terminal's lines and its last screen are drawn:
it need not reach the store itself.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import redact

_MARK = ":: "
_LOCK = threading.Lock()

Facts = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What a line says.

    Attributes:
        kind: running, waiting, line, done (now), kept (an earlier attempt made it), failed or end (of the run).
        stage: of which stage; empty at the end of the run.
        text: the line; for failed, the error and its fix.
        code: exit status of the stage that failed, or of the run.
        at: when, in seconds since 1970; 0 for a line.
        facts: path below the run -> content, of what is done or kept.
    """

    kind: str
    stage: str = ""
    text: str = ""
    code: int = 0
    at: float = 0.0
    facts: Facts = field(default_factory=dict)


def say(kind: str, stage: str = "", text: str = "", code: int = 0, facts: Mapping[str, Any] | None = None) -> None:
    """Print an event; a line of a stage is printed as it is, after the stage's name."""
    if kind == "line":
        line = redact(text if text.startswith(f"{stage}: ") or not stage else f"{stage}: {text}")
    else:
        content: dict[str, Any] = {
            "event": kind,
            "stage": stage,
            "text": redact(text),
            "code": code,
            "at": round(time.time(), 1),
            "facts": facts,
        }
        found = {key: value for key, value in content.items() if value or key == "event"}
        line = _MARK + json.dumps(found, ensure_ascii=False)
    with _LOCK:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def read(line: str) -> Event:
    """The event of a line; whatever is none is a line."""
    if line.startswith(_MARK):
        try:
            content = json.loads(line.removeprefix(_MARK))
            return Event(
                str(content["event"]),
                str(content.get("stage", "")),
                str(content.get("text", "")),
                int(content.get("code", 0)),
                float(content.get("at", 0)),
                dict(content.get("facts", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    return Event("line", text=line)
