"""Call a function in a process of its own: the driver of an object store would stay in the memory of a launcher that waits.

python -m components.launch.apart MODULE:FUNCTION '[ARGUMENTS]'     # prints {"value": ...} as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from trainer import plugins
from trainer.errors import EXIT_OK, MillraceError, StorageError, redact

_TIMEOUT_S = 600.0


def call(target: str, *arguments: Any) -> Any:
    """What `MODULE:FUNCTION` returns for plain arguments: texts, numbers, lists and dicts of them.

    Raises:
        MillraceError: what the function raises, with its message, hint and exit code; StorageError after 10 min.
    """
    words = [sys.executable, "-m", __spec__.name, target, json.dumps(arguments)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        asked = redact(" ".join(map(str, arguments)))
        raise StorageError(f"{asked}: no answer for {_TIMEOUT_S:g} s", "look at the store and the network") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"{target} ended with {done.returncode}: {done.stderr[-2000:]}") from None
    if "error" in answer:
        error = MillraceError(answer["error"], answer["hint"])
        error.exit_code = answer["exit_code"]
        raise error
    return answer["value"]


def main(target: str, arguments: str) -> int:
    """Entry point of the process."""
    try:
        answer = {"value": plugins.load(target)(*json.loads(arguments))}
    except MillraceError as error:
        answer = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    print(json.dumps(answer))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
