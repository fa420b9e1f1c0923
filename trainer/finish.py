"""The last task of a pipeline run, whatever became of it: clean up in the store, and tell people.

python -m trainer finish --executor-input '{{$}}'

It runs after success, after a failure and after a cancel. What a killed stage left unfinished in the store is removed:
a folder without its manifest, which is written last. With MILLRACE_NOTIFY_URL in the environment, from a secret, a
line is posted there as JSON (`text`, `state`, `run_name`, `run_id`), which Slack, Mattermost and the like show as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from trainer import executor, log, storage
from trainer.errors import EXIT_OK, MillraceError, redact

NOTIFY_URL = "MILLRACE_NOTIFY_URL"
_TIMEOUT_S = 10.0
# The backend gives the last state that the metadata store has of the chain (driver/resolve.go): COMPLETE or FAILED, as its
# last launcher left it. RUNNING says nothing: so it is after a cancel, after "nothing new", which no launcher ends, and
# before 2.17 after every run, because a state did not go up from the branch to the chain. Local runs say SUCCEEDED.
_ENDS = {
    "SUCCEEDED": "is done",
    "COMPLETE": "is done",
    "FAILED": "failed",
    "RUNNING": "is over; its page says how it ended",
    "CANCELLED": "was cancelled",
}


def run(text: str, overrides: Sequence[str] = ()) -> int:
    """Clean up and notify as an ExecutorInput says; returns the exit status: 0 even if nothing can be reached."""
    given = executor.read(text)
    state = _state(given.values.get("status"))
    name, identity = (str(given.values.get(key) or "") for key in ("run_name", "run_id"))
    if given.store and re.fullmatch(r"\w[\w.-]*", identity):  # never the store itself, or what is above it
        try:
            for folder in clean(f"{given.store}/{identity}"):
                log.say(f"finish: removed what was not finished: {redact(folder)}")
        except (MillraceError, OSError) as error:  # a run that is done stays so, and people are told
            log.say(f"finish: not cleaned up: {redact(str(error))}")
    line = f"millrace: run {name or identity} {_ENDS.get(state, 'ended')}"
    log.say(f"finish: {line.removeprefix('millrace: ')}")
    notify({"text": line, "state": state, "run_name": name, "run_id": identity})
    executor.write(given, {})
    return EXIT_OK


def _state(status: Any) -> str:
    """The state in a PipelineTaskFinalStatus, which is an object or its JSON text."""
    with contextlib.suppress(ValueError):
        status = json.loads(status) if isinstance(status, str) else status
    found = status.get("state") if isinstance(status, dict) else None
    return str(found or "UNKNOWN").upper()


def clean(prefix: str) -> list[str]:
    """Remove the artifact folders below a run's folder of the store that have no manifest; returns them.

    Args:
        prefix: `STORE/RUN`; artifacts are at `TASK/ATTEMPT/PORT` below it, those of local runs at `TASK/PORT`.
    """
    fs, root = storage.filesystem(prefix if storage.is_remote(prefix) else f"file://{storage.local_path(prefix)}")
    removed = []
    with storage.explained(prefix):
        folders: dict[str, set[str]] = defaultdict(set)
        complete = set()  # of local runs
        for key in fs.find(root) if fs.exists(root) else []:
            parts = PurePosixPath(str(key).removeprefix(root).lstrip("/")).parts
            if len(parts) == 3 and parts[2] == storage.MANIFEST:
                complete.add("/".join(parts[:2]))
            if len(parts) > 3:
                folders["/".join(parts[:3])].add("/".join(parts[3:]))
        for folder, files in sorted(folders.items()):
            if storage.MANIFEST not in files and folder.rpartition("/")[0] not in complete:
                fs.rm(f"{root}/{folder}", recursive=True)
                removed.append(f"{prefix}/{folder}")
    return removed


def notify(message: dict[str, Any]) -> None:
    """Post a message to the URL in the environment, if there is one; a failure is said and forgiven.

    The URL is a secret, so no error that holds it is printed.
    """
    url = os.environ.get(NOTIFY_URL, "")
    if not url:
        return
    if not url.startswith(("https://", "http://")):
        log.say(f"finish: nobody was told: {NOTIFY_URL} is no http URL")
        return
    content, head = json.dumps(message).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, content, head)  # noqa: S310
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
            pass
    except urllib.error.HTTPError as error:
        log.say(f"finish: nobody was told: the address answered {error.code}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        log.say(f"finish: nobody was told: {type(reason).__name__}")
