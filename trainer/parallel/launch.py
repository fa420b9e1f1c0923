"""Train on several ranks, of this machine or of several pods: torchrun in a process group of its own, with errors and
exit codes kept.

SIGTERM is passed on to the ranks, which write a checkpoint. Nothing is left behind: the agent ends with this process,
the ranks end with the agent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import trainer
from trainer import errors, log, storage
from trainer.errors import EXIT_FAILURE, EXIT_PREEMPTED, MillraceError, Preempted
from trainer.parallel import arrivals, fits, made, nodes
from trainer.stage import Call, Result

SPEC, RESULT, FAILURES, ERRORS, ARRIVALS = "spec.json", "result.json", "failures.json", "errors", "arrivals"
# Kinds of errors that another attempt may not meet again.
TRACEBACK, UNANSWERED = "traceback", arrivals.Unanswered.__name__
# Kinds that tell of another node's end, or of an order from outside, not of a fault here.
FROM_OUTSIDE = (UNANSWERED, arrivals.PeerLost.__name__, Preempted.__name__)
TRANSIENT = (TRACEBACK, errors.OutOfMemory.__name__, *FROM_OUTSIDE)
# In place of a rank, where torchrun itself has an error.
AGENT = -1


class RankFailed(MillraceError):
    """A rank ended without a message of ours: a signal from outside, or a bug."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def launch(call: Call, target: str = "trainer.train.produce:train") -> Result:
    """Train on `params.train.processes` ranks of each node and give back what rank 0 returned.

    On other nodes than the first the result is empty: nothing is made there.

    Args:
        call: the stage's call.
        target: function `Call -> Result` that each rank calls.

    Raises:
        ConfigError: the model cannot be divided among so many ranks as section `parallel` says.
        MillraceError: as a rank raised it.
        RankFailed: a rank was killed, hung, or met an unexpected error, more often than `parallel.max_restarts` allows.
    """
    node = nodes.here()
    fits.check(call.params, call.params.train.processes * node.count)
    if node.count == 1:
        place = call.scratch / "ranks"
        storage.remove(place)
        place.mkdir(parents=True)
        return _launch(call, target, place, node)
    if not made.is_kept(call.scratch):
        # Not in the scratch folder, which all nodes share.
        with tempfile.TemporaryDirectory(prefix="millrace-ranks-") as own:
            try:
                return _launch(call, target, Path(own), node)
            except RankFailed:
                if not made.is_kept(call.scratch):
                    raise
    log.say("all nodes have done their work; what they made is published")
    return _result(made.take(call.scratch, call.outputs)) if node.rank == 0 else Result()


def _launch(call: Call, target: str, place: Path, node: nodes.Node) -> Result:
    (place / ERRORS).mkdir()
    spec = {
        "target": target,
        "params": call.params.model_dump(mode="json"),
        "inputs": {name: str(Path(path).absolute()) for name, path in call.inputs.items()},
        "outputs": {name: str(Path(path).absolute()) for name, path in call.outputs.items()},
        "scratch": str(call.scratch.absolute()),
    }
    (place / SPEC).write_text(json.dumps(spec), encoding="utf-8")
    if node.count == 1:
        arrivals.create(place / ARRIVALS, call.params.train.processes)
    arguments = [
        *_meeting(node),
        f"--nproc-per-node={call.params.train.processes}",
        f"--max-restarts={call.params.parallel.max_restarts}",
        "--monitor-interval=0.1",
        "--module",
        "trainer.train.worker",
        str(place.absolute()),
    ]
    command = [sys.executable, "-m", "trainer.parallel.agent", str(os.getpid()), str(place.absolute())]
    terminated = False
    process = subprocess.Popen([*command, *arguments], env=_environment(), start_new_session=True)
    try:
        with _forwarding(process) as asked:
            process.wait()
            terminated = bool(asked)
    finally:
        # The ranks have sessions of their own and die with the agent.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0 and node.rank:
        return Result()
    if process.returncode == 0:
        return _result((place / RESULT).read_bytes())
    raise explain(place, process.returncode, terminated)


def _result(text: bytes) -> Result:
    content = json.loads(text)
    return Result(**content | {"volatile": tuple(content["volatile"])})


def _meeting(node: nodes.Node) -> list[str]:
    """Options of torchrun for where its nodes meet: here, or in our lobby."""
    if node.count == 1:
        return ["--standalone"]
    return [f"--nnodes={node.count}", "--rdzv-backend=millrace", f"--rdzv-endpoint={node.host}:{node.port}"]


def _environment() -> dict[str, str]:
    """This process's environment, with our package importable and torchrun's warning about threads settled."""
    home = str(Path(trainer.__file__).parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    # A lost peer is told in one line; torch's own pages of frames say no more.
    return {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass SIGTERM on to a process; the list holds the signals that came."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(place: Path, status: int, terminated: bool) -> MillraceError:
    """The error that a failed launch means, from what its ranks and the agent wrote.

    Args:
        place: the launch's folder.
        status: the agent's exit status.
        terminated: whether SIGTERM was passed on.
    """
    found = read_errors(place)
    for rank in sorted(found, key=lambda rank: (found[rank]["exit_code"] == EXIT_PREEMPTED, rank)):
        error = found[rank]
        if error["kind"] not in (TRACEBACK, UNANSWERED, arrivals.PeerLost.__name__):
            return _rebuild(error)
    if terminated:
        return Preempted("train: SIGTERM before a checkpoint could be written", "run the same command again")
    if any(error["kind"] == UNANSWERED for error in found.values()):
        return _hung(place, found)
    hint = "SIGKILL often means too little memory; the same command resumes from the newest checkpoint"
    codes = _exit_codes(place)
    lost = [error for error in found.values() if error["kind"] == arrivals.PeerLost.__name__]
    if lost and not any(code < 0 for code in codes.values()):
        return RankFailed(lost[0]["message"], lost[0]["hint"], lost[0]["exit_code"])
    # The agent ends the survivors of a dead rank by SIGTERM, and their collectives fail: any other signal is the cause.
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:
            fix = hint if code == -signal.SIGKILL else "see what it said above; the same command resumes"
            return RankFailed(f"rank {rank} was ended by {signal.Signals(-code).name}", fix, 128 - code)
    for rank, error in sorted(found.items()):
        sys.stderr.write(f"rank {rank}: {error['message']}")
        return RankFailed(f"rank {rank}: an unexpected error", "see the traceback above", EXIT_FAILURE)
    return RankFailed(f"torchrun ended with status {status}", hint, 128 - status if status < 0 else status)


def _hung(place: Path, found: dict[int, dict[str, Any]]) -> RankFailed:
    """The error that a timeout of a collective means: which ranks the others waited for in vain.

    It is those that had come to the fewest collectives when the others gave up. Where all were at the same one, it is
    those that did not fail as the others did and were ended by torchrun.
    """
    waited = {rank: error for rank, error in found.items() if error["kind"] == UNANSWERED}
    missing = {rank for error in waited.values() for rank in error["last"]} - set(waited)
    if not missing:
        params = json.loads((place / SPEC).read_text(encoding="utf-8"))["params"]
        missing = set(range(params["train"]["processes"] * nodes.here().count)) - set(found)
    first = waited[min(waited)]
    if not missing:
        who = "no rank is known to have stopped: the connection between them may have"
    else:
        names = " and ".join(f"rank {rank}" for rank in sorted(missing))
        who = f"{names} hung: the others waited in vain"
    return RankFailed(f"{who} ({first['message']})", first["hint"], first["exit_code"])


def _rebuild(error: dict[str, Any]) -> MillraceError:
    kind = getattr(errors, error["kind"], MillraceError)
    rebuilt: MillraceError = kind(error["message"], error["hint"])
    rebuilt.exit_code = error["exit_code"]
    return rebuilt


def _exit_codes(place: Path) -> dict[int, int]:
    """Exit status of the failed ranks, negative for a signal, as the agent wrote them."""
    try:
        codes = json.loads((place / FAILURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {int(rank): int(code) for rank, code in codes.items()}


def read_errors(place: Path) -> dict[int, dict[str, Any]]:
    """What the ranks of a launch wrote before they ended: rank -> {kind, message, hint, exit_code}."""
    found = {}
    for path in (place / ERRORS).glob("rank-*.json"):
        with suppress(OSError, ValueError):
            found[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text(encoding="utf-8"))
    return found


def forget_error(place: Path, rank: int) -> None:
    """Remove what a rank wrote in an earlier attempt: it says nothing about this one."""
    _error_file(place, rank).unlink(missing_ok=True)


def _error_file(place: Path, rank: int) -> Path:
    return place / ERRORS / f"rank-{rank:04d}.json"


def write_error(place: Path, rank: int, error: BaseException) -> int:
    """Note an error for the launcher; returns the exit status that it means."""
    import traceback

    if isinstance(error, MillraceError):
        content: dict[str, Any] = {
            "kind": type(error).__name__, "message": error.message, "hint": error.hint, "exit_code": error.exit_code,
        }  # fmt: skip
        if isinstance(error, arrivals.Unanswered):
            content["last"] = error.last
    else:
        text = "".join(traceback.format_exception(error))
        content = {"kind": TRACEBACK, "message": text, "hint": "", "exit_code": EXIT_FAILURE}
    storage.write_atomic(_error_file(place, rank), json.dumps(content).encode())
    return int(content["exit_code"])
