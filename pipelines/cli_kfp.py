"""The commands of `millrace` that talk to Kubeflow Pipelines, as argparse sees them; what they do is in
commands_kfp.py and commands_schedule.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

# Command -> the module that has it.
COMMANDS = dict.fromkeys(("compile", "submit", "status", "logs", "cancel", "runs"), "pipelines.commands_kfp") | {
    "schedule": "pipelines.commands_schedule"
}
ACTIONS = ("ls", "pause", "resume", "rm", "next")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_EPILOG = """The host and the login also come from MILLRACE_KFP_HOST, MILLRACE_KFP_NAMESPACE, MILLRACE_KFP_EXPERIMENT,
MILLRACE_KFP_TOKEN or MILLRACE_KFP_TOKEN_FILE, and MILLRACE_KFP_COOKIES; in a pod also from its service account's token."""
Command = Callable[..., Any]


def add_commands(command: Command) -> None:
    """Add them to the command line."""
    _add_compile(command)
    _add_submit(command)
    _add_schedule(command)
    _add_status(command)
    _add_logs(command)
    sub = command("cancel", "end a run on the cluster", "cancel", epilog=_EPILOG)
    _run(sub)
    _connection(sub)
    sub = command("runs", "list the runs on the cluster, the newest first", "runs", epilog=_EPILOG)
    sub.add_argument("--limit", metavar="N", type=int, default=20, help="at most so many (default: 20)")
    _connection(sub)


def _add_compile(command: Command) -> None:
    sub = command("compile", "write the pipeline as a package for Kubeflow Pipelines", "compile")
    sub.add_argument(
        "-o", "--output", metavar="FILE", default="pipeline.yaml", help="file to write, or - (default: pipeline.yaml)"
    )
    _overrides(sub)


def _add_submit(command: Command) -> None:
    sub = command("submit", "run the pipeline on a cluster and wait for it", "submit", epilog=_EPILOG)
    sub.add_argument("--name", metavar="NAME", default="", help="name of the run (default: the model's, and the time)")
    sub.add_argument("--no-wait", action="store_true", help="leave as soon as the run has been started")
    sub.add_argument(
        "--timeout", metavar="TIME", type=duration, help="wait at most so long, such as 90m or 12h; the run goes on"
    )
    _connection(sub)
    _overrides(sub)


def _add_schedule(command: Command) -> None:
    sub = command("schedule", "retrain when there is new data, at fixed times", "schedule", epilog=_EPILOG)
    sub.add_argument(
        "--cron", metavar="CRON", default="",
        help='when, in UTC: minute hour day-of-month month day-of-week, such as "0 3 * * 1", or @daily; seconds may stand before',
    )  # fmt: skip
    sub.add_argument("--name", metavar="NAME", default="", help="name of the schedule (default: the model's)")
    sub.add_argument("--always", action="store_true", help="train also when the data is the champion's")
    sub.add_argument("--count", metavar="N", type=int, default=5, help="with `next`: how many times (default: 5)")
    _connection(sub)
    sub.add_argument(
        "overrides", metavar="ls|pause|resume|rm|next [NAME] or section.key=value", nargs="*", default=[], action=Words,
        help="what to do with schedules that are there, or, with --cron, parameters to set",
    )  # fmt: skip
    sub.set_defaults(words=[])


class Words(argparse.Action):
    """Words with a `=` are overrides; the others are an action and a name."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Put them apart."""
        namespace.words = [word for word in values if "=" not in word]
        namespace.overrides = [word for word in values if "=" in word]


def _add_status(command: Command) -> None:
    sub = command("status", "show a run on the cluster, task by task", "status", epilog=_EPILOG)
    _run(sub)
    sub.add_argument("--watch", action="store_true", help="until it has ended; exit status 1 if it did not succeed")
    _connection(sub)


def _add_logs(command: Command) -> None:
    sub = command("logs", "print the logs of a run's tasks", "logs", epilog=_EPILOG)
    _run(sub)
    sub.add_argument(
        "task", metavar="TASK", nargs="?", default="", help="only this one (default: what failed, else runs, else all)"
    )
    sub.add_argument("--follow", action="store_true", help="go on until the task has ended")
    _connection(sub)


def _run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "run", metavar="RUN", nargs="?", default="latest", help="id, its beginning, or name (default: latest)"
    )


def _overrides(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="set a parameter for this; params.yaml is kept",
    )


def _connection(sub: argparse.ArgumentParser) -> None:
    for flag, metavar, help in (
        ("--host", "URL", "address of Kubeflow Pipelines, such as http://localhost:8080"),
        ("--namespace", "NAME", "your profile, on a cluster with several users"),
        ("--experiment", "NAME", "under which runs are filed (default: millrace)"),
        ("--token-file", "FILE", "a file that holds the bearer token"),
        ("--cookies-file", "FILE", "a file that holds the cookies of a browser that is logged in"),
        ("--ca-file", "FILE", "certificates (PEM) that sign the server's"),
    ):
        sub.add_argument(flag, metavar=metavar, default="", help=help)


def duration(word: str) -> float:
    """Seconds of a word such as 45, 90s, 30m, 12h or 2d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", word)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{word!r} is no time such as 90s, 30m or 12h")
    return float(found[1]) * _SECONDS[found[2]]
