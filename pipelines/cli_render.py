"""The command `millrace render` as argparse sees it; what it does is in commands_render.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MODULE = "pipelines.commands_render"
KINDS = ("pytorchjob", "trainjob", "job", "experiment", "pipeline")
_EPILOG = """pytorchjob   training, for the Kubeflow training operator (kubeflow.org/v1)
trainjob     training, for Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1), with its TrainingRuntime
job          one stage in one pod (batch/v1): --stage
experiment   the search, for Katib (kubeflow.org/v1beta1)
pipeline     the whole chain for Kubeflow Pipelines, as `millrace compile` writes it

What cluster.job and cluster say of it: docs/jobs.md."""


def add_command(command: Callable[..., Any]) -> None:
    """Add it to the command line."""
    sub = command("render", "print what would be sent to a cluster, for kubectl", "render", epilog=_EPILOG)
    sub.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    sub.add_argument("--name", metavar="NAME", default="", help="name of the object (default: millrace-STAGE)")
    sub.add_argument("--namespace", metavar="NAME", default="", help="namespace of the object (default: kubectl's)")
    sub.add_argument("--stage", metavar="STAGE", default="", help="with job: the stage (default: train)")
    for flag, target, what in (("--in", "inputs", "read"), ("--out", "outputs", "written")):
        help = f"where an artifact is {what} (default: below cluster.store, or the claim's mount)"
        sub.add_argument(flag, dest=target, metavar="NAME=URI", action="append", default=[], help=help)
    sub.add_argument(
        "--pod-security",
        metavar="LEVEL",
        choices=("restricted", "baseline", "privileged"),
        default="restricted",
        help="what the namespace enforces (default: restricted)",
    )
    sub.add_argument("-o", "--output", metavar="FILE", default="-", help="file to write, or - (default: -)")
    sub.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="set a parameter; params.yaml is kept"
    )
