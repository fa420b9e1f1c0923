"""The command `millrace checkpoint` as argparse sees it; what it does is in commands_checkpoint.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MODULE = "pipelines.commands_checkpoint"


def add_command(command: Callable[..., Any]) -> None:
    """Add it to the command line."""
    sub = command("checkpoint", "list, check or export the checkpoints of a training run", "checkpoint")
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help in (
        ("ls", "list checkpoints: step, time, size, score and state"),
        ("verify", "check every byte; ends with 2 if one is wrong, or if there is no checkpoint"),
        ("export", "write a model folder from the best weights, or from those of a step"),
    ):
        each = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        each.add_argument(
            "place", metavar="PLACE", nargs="?", default="out/.scratch",
            help="a stage's scratch folder, or the URI of train.checkpoint_store (default: out/.scratch)",
        )  # fmt: skip
        if name != "ls":
            each.add_argument("--step", metavar="N", type=int, help="only the checkpoint of this step")
        if name == "export":
            each.add_argument("--out", metavar="DIR", required=True, help="the model folder to write")
