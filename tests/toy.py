"""A toy stage for tests of the stage contract; as a script, the entry point of the images with that stage added.

    register(monkeypatch)                                              # in the same process
    subprocess.run([sys.executable, "-m", "tests.toy", "toy", ...])    # in its own

What the stage does is told by the environment variable TOY: `write` (default), `refuse`, `wait`, `fail`, `huge`, ...
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

from trainer import log
from trainer.artifacts import manifest
from trainer.errors import DataError
from trainer.stage import STAGES, Call, Port, Result, Stage

TOY = Stage(
    "toy",
    "copy the input and add to it",
    "tests.toy:run",
    ("data", "train"),
    {"source": Port("dataset", "something to copy"), "extra": Port("model", "something else", optional=True)},
    {"made": Port("model", "the copy"), "notes": Port("notes", "what was done")},
)


def register(monkeypatch) -> None:
    """Add the stage to the table for the duration of a test."""
    monkeypatch.setitem(STAGES, "toy", TOY)


def make(folder: Path, kind: str = "dataset", meta: dict | None = None, files: dict[str, bytes] | None = None) -> Path:
    """Write and seal a small artifact."""
    folder.mkdir(parents=True)
    for name, content in (files or {"a.bin": bytes(range(256)), "sub/b.txt": b"text\n", "empty": b""}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest.seal(folder, kind, meta or {"rows": 3, "data_version": "d41d8"}, {"seconds": 1.0})
    return folder


def run(call: Call) -> Result:
    """The stage function."""
    todo = os.environ.get("TOY", "write")
    call.scratch.mkdir(parents=True, exist_ok=True)
    counter = call.scratch / "attempts"
    counter.write_text(counter.read_text() + "x" if counter.exists() else "x")
    for path in call.inputs["source"].rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            target = call.outputs["made"] / path.relative_to(call.inputs["source"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (call.outputs["made"] / "lr.txt").write_text(str(call.params.train.lr))
    (call.outputs["notes"] / "time.txt").write_text(str(time.time()))
    (call.outputs["notes"] / "attempts.txt").write_text(counter.read_text())
    log.say("toy at work", inputs=len(call.inputs))
    if todo in ACTIONS:
        ACTIONS[todo](call)
    reason = "not better than the champion" if todo == "refuse" else ""
    metrics = {"accuracy": 0.5, "perplexity": float("inf")}
    return Result(metrics, {"made": {"rows": 3}}, ("time.txt", "attempts.txt"), reason)


def _wait(call: Call) -> None:
    print("waiting", flush=True)
    time.sleep(60)


def _fail(call: Call) -> None:
    raise DataError("rows.csv:3: no label", "correct the row")


def _bug(call: Call) -> None:
    raise RuntimeError("cannot read s3://key:topsecret@bucket/data")


def _missing(call: Call) -> None:
    (call.outputs["made"] / "never-written").read_bytes()


def _huge(call: Call) -> None:
    with open(call.outputs["made"] / "huge", "wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))


def _chatty(call: Call) -> None:
    for number in range(100_000):
        log.say(f"line {number}")


def _quota(call: Call) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


ACTIONS = {
    "wait": _wait, "fail": _fail, "bug": _bug, "missing": _missing, "huge": _huge, "chatty": _chatty, "quota": _quota,
}  # fmt: skip


if __name__ == "__main__":
    from trainer.__main__ import main

    STAGES["toy"] = TOY
    sys.exit(main())
