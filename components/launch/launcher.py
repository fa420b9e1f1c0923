"""Start a job and wait for its end: what it prints, how it stands, and one error that says why it failed.

    outcome = run(Api.connect(), spec, [pytorchjob(spec)])

A launcher that is killed loses nothing: the same call attaches to the job. One that gets SIGTERM takes the job with it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

from components.launch import observe, submit
from components.launch.api import Api, ApiError, Object
from components.launch.judge import Verdict
from components.launch.logs import Out, say
from components.launch.spec import JobSpec
from components.launch.tracker import Signalled, Tracker
from trainer import signals
from trainer.errors import MillraceError


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        name: of the job.
        ok: whether it succeeded.
        reason: one word of the cluster's own; empty for a success.
        message: what happened, for people.
        hint: what to do about it.
        exit_code: 0, the stage's own where it ended with a permanent one, else 1 or 2.
        restarts: pods that had to be put in place again.
        waited_s: seconds until all its pods ran.
        ran_s: seconds from then on.
    """

    name: str
    ok: bool
    reason: str = ""
    message: str = ""
    hint: str = ""
    exit_code: int = 0
    restarts: int = 0
    waited_s: float = 0.0
    ran_s: float = 0.0

    def check(self) -> None:
        """Raise a JobFailed unless the job succeeded."""
        if not self.ok:
            raise JobFailed(self.message, self.hint, self.exit_code)


class JobFailed(MillraceError):
    """A job failed; the exit code is the stage's own where it is a permanent one."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Stopped(MillraceError):
    """A signal came, and the job was taken away (or left, if that was asked for)."""

    def __init__(self, number: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + number


def run(
    api: Api,
    spec: JobSpec,
    manifest: Sequence[Object],
    *,
    out: Out = say,
    detach: bool = False,
) -> Outcome:
    """Start a job, or attach to it, and wait for its end.

    Args:
        api: the API server.
        spec: what is asked for.
        manifest: the job as it is rendered, after the objects that it refers to.
        out: takes each line, from several threads: those of rank 0 as they are, ours about the job.
        detach: leave the job running when a signal ends the launcher.

    Raises:
        ConfigError: another job of this name is there, and has not ended.
        Stopped: SIGTERM, SIGINT or SIGHUP came.
        ApiError: the API server refuses what the launcher needs, or was away for `API_PATIENCE_S`.
    """
    with guarded(api, spec, manifest, out, detach=detach) as held:
        job = submit.attach(api, spec, manifest, out)
        held.uid = job["metadata"]["uid"]
        with Tracker(api, spec, job, out) as tracker:
            verdict = tracker.wait()
        if verdict.state == "failed":
            try:
                _clean(api, spec, manifest, tracker, verdict, out)
            except ApiError as error:  # why it failed is what people need to know
                out(f"{spec.name}: not removed: {error.message}")
    history = tracker.history
    waited = max((tracker.began_at or api.now()) - tracker.created, 0.0)
    ok = verdict.state == "succeeded"
    outcome = Outcome(
        spec.name, ok, verdict.reason, f"{spec.stage}: {verdict.message}", verdict.hint, verdict.exit_code,
        history.restarts, waited, history.ran_s,
    )  # fmt: skip
    again = f", {history.restarts} pods replaced" if history.restarts else ""
    end_word = "succeeded" if ok else f"failed ({verdict.reason})"
    out(f"{spec.name}: {end_word}: waited {waited:.0f} s, ran {history.ran_s:.0f} s{again}")
    return outcome


def _clean(api: Api, spec: JobSpec, manifest: Sequence[Object], tracker: Tracker, verdict: Verdict, out: Out) -> None:
    """Let nothing of a job that failed run on, and nobody take it for a success."""
    if tracker.job is None or not tracker.terminal:
        submit.remove(api, spec, manifest, uid=tracker.uid, out=out)
        return
    # The job and its logs stay for their time to live; what still runs holds accelerators for nothing.
    if observe.condition(tracker.job)[0] == "succeeded":
        submit.refute(api, spec, tracker.job, verdict.reason)
    submit.remove_pods(api, spec, tracker.living, out)


@dataclass
class Held:
    """The job that a signal takes away: its uid, empty until it was made or found."""

    uid: str = ""


@contextmanager
def guarded(api: Api, spec: JobSpec, manifest: Sequence[Object], out: Out, *, detach: bool) -> Iterator[Held]:
    """Take a job away, with its pods, if a signal comes inside.

    Args:
        api: the API server.
        spec: the job.
        manifest: its objects.
        out: told what could not be removed.
        detach: leave the job running.

    Yields:
        Where to write the job's uid, once it is known.

    Raises:
        Stopped: a signal came.
    """
    held = Held()
    try:
        with _signalled():
            yield held
    except Signalled as end:
        if not detach:
            _take_away(api, spec, manifest, held.uid, out)
        name = signal.Signals(end.number).name
        what = "goes on without us" if detach else "was removed"
        raise Stopped(
            end.number, f"{name}: {spec.name} {what}", "the same command goes on from its checkpoint"
        ) from None


@contextmanager
def _signalled() -> Iterator[None]:
    """Raise `Signalled` at the first signal; later ones do not disturb the cleaning up. Only the main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        for each in signals.END:
            signal.signal(each, signal.SIG_IGN)
        raise Signalled(number)

    with signals.caught(handler, *signals.END):
        yield


def _take_away(api: Api, spec: JobSpec, manifest: Sequence[Object], uid: str, out: Out) -> None:
    """Delete what is ours, the request first: Kubeflow kills us 0.6 s after its SIGTERM."""
    with signals.caught(lambda *_: None, *signals.END) if _is_main() else ExitStack():
        try:
            submit.withdraw(api, spec, manifest, uid=uid, out=out, within_s=20.0)
        except ApiError as error:
            out(f"{spec.name}: not removed: {error.message}")


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
