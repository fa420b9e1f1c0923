"""`millrace render`: what would be sent to a cluster, as YAML for `kubectl apply -f -`. Talks to no cluster."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from components.launch import batchjob, pytorchjob, trainjob
from components.launch.experiment import experiment, no_early_stopping
from components.launch.spec import PARAMS_ENV, checkpoints, stage, training
from pipelines import kube_yaml
from pipelines.commands_kfp import params_of
from pipelines.project import require_installed
from trainer import storage
from trainer.config import Params
from trainer.config.names import nearest
from trainer.errors import EXIT_OK, ConfigError
from trainer.stage import STAGES


def render(args: Namespace) -> int:
    """`millrace render`."""
    params = params_of(args.overrides)
    if args.kind == "pipeline":
        require_installed("millrace render pipeline", "kfp", "kfp.kubernetes")
        from pipelines import compiler

        text = compiler.text(params)
    else:
        require_installed("millrace render", "kubeflow.training", "kubeflow_katib_api", "kubeflow_trainer_api")
        from components.launch.validate import check

        restricted = args.pod_security == "restricted"
        made = objects(params, args, restricted)
        check(made, restricted=restricted)
        if args.kind == "experiment" and (note := no_early_stopping(params.tune, restricted)):
            print(f"note: {note}; --pod-security baseline has it", file=sys.stderr)
        text = kube_yaml.documents(made)
    if args.output == "-":
        print(text, end="")
    else:
        storage.write_atomic(Path(args.output), text.encode())
        print(f"wrote {args.output}", file=sys.stderr)
    return EXIT_OK


def objects(params: Params, args: Namespace, restricted: bool) -> list[dict[str, Any]]:
    """The objects of a kind, in the order in which they are to be made.

    Raises:
        ConfigError: the configuration does not fit the kind, or nothing says where artifacts are.
    """
    kind, task = args.kind, {"experiment": "tune", "job": args.stage or "train"}.get(args.kind, "train")
    if args.stage and kind != "job":
        raise ConfigError(f"--stage {args.stage}: {kind} is of stage {task} alone", "leave it out, or use `render job`")
    if task not in STAGES:
        raise ConfigError(f"--stage {task}: no such stage; {nearest(task, STAGES)}", "correct the name")
    given = {"name": args.name or f"millrace-{task}", "namespace": args.namespace}
    if kind == "experiment":
        words = ("trial", *_words(params, args, task, outputs=False))
        return experiment(params, args=words, restricted=restricted, **given)
    words = (task, *_words(params, args, task))
    output = next(word for flag, word in pairwise(words) if flag == "--out").partition("=")[2]
    nodes = 1 if kind == "job" else params.cluster.job.nodes
    words += tuple(checkpoints(params, given["name"], output, nodes))
    if kind == "job":
        return [batchjob.job(stage(params, task, args=words, **given))]
    spec = training(params, args=words, **given)
    return trainjob.trainjob(spec) if kind == "trainjob" else [pytorchjob.pytorchjob(spec)]


def _words(params: Params, args: Namespace, task: str, outputs: bool = True) -> list[str]:
    """`--params env:MILLRACE_PARAMS --in dataset=URI --out model=URI`: what is not given lies in the store."""
    row, words = STAGES[task], ["--params", f"env:{PARAMS_ENV}"]
    needed = {name: port for name, port in row.inputs.items() if not port.optional}
    for flag, ports, known, pairs in (
        ("--in", needed, row.inputs, args.inputs),
        ("--out", row.outputs if outputs else {}, row.outputs if outputs else {}, args.outputs),
    ):
        uris = dict(_pair(flag, pair, known) for pair in pairs)
        for name in [*(name for name in ports if name not in uris), *uris]:
            words += [flag, f"{name}={uris.get(name) or _place(params, flag, name)}"]
    return words


def _pair(flag: str, word: str, known: Sequence[str] | Any) -> tuple[str, str]:
    name, _, uri = word.partition("=")
    if name not in known or not uri:
        raise ConfigError(
            f"{flag} {word}: must be NAME=URI; {nearest(name, list(known))}", "for example dataset=s3://bucket/dataset"
        )
    return name, uri


def _place(params: Params, flag: str, name: str) -> str:
    root = params.cluster.store.rstrip("/") or (params.cluster.claim and params.cluster.mount)
    if not root:
        message = f"cluster.store: nothing says where {name} is: pods share neither a volume nor an object store"
        raise ConfigError(message, f"set cluster.claim or cluster.store, or give {flag} {name}=URI")
    return f"{root}/{name}"
