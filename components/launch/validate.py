"""Check rendered objects before they are sent: fields and types by the projects' models, then the rules of the webhooks.

    python -m components.launch.validate < objects.json

reads `{"objects": [...], "restricted": true}` and prints what is wrong, one line each; exit status 2 if anything is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from components.launch import katib_rules, names, rules, shapes
from trainer.errors import EXIT_BAD_INPUT, EXIT_OK, ConfigError

# Where a field of an object comes from: the first pattern that its path matches -> the key of params.yaml.
_KEYS = (
    (r"metadata\.name", "--name"),
    (r"(.*\.)?(env|variables)\..*", "cluster.job.env"),
    (r"(.*\.)?image", "cluster.image_prefix"),
    (r"(.*\.)?(shm|sizeLimit)", "cluster.shm"),
    (r"(.*\.)?resources\.(.*\.)?(cpu|memory)", "cluster.resources"),
    (r"(.*\.)?resources(\..*)?", "cluster.job.devices"),
    (r"(.*\.)?nodeSelector(\..*)?", "cluster.job.node_selector"),
    (r"(.*\.)?tolerations(\..*)?", "cluster.job.tolerations"),
    (r"(.*\.)?serviceAccountName", "cluster.job.service_account"),
    (r"(.*\.)?priorityClass(Name)?", "cluster.job.priority_class"),
    (r"(.*\.)?imagePullSecrets(\..*)?", "cluster.pull_secrets"),
    (r"(.*\.)?(volumes|volumeMounts)(\..*)?", "cluster.claim"),
    (r"(.*\.)?securityContext(\..*)?", "cluster.user"),
    (r"(.*\.)?(nprocPerNode|numProcPerNode|nProcPerNode)", "train.processes"),
    (r"(.*\.)?(maxRestarts|backoffLimit)", "cluster.job.restarts"),
    (r"(.*\.)?ttlSecondsAfterFinished", "cluster.job.ttl_s"),
    (r"(.*\.)?activeDeadlineSeconds", "cluster.job.run_timeout_s"),
    (r"(.*\.)?terminationGracePeriodSeconds", "cluster.job.grace_s"),
    (r"(.*\.)?(schedulingPolicy|podGroupPolicy)(\..*)?", "cluster.job.queue"),
    (r"(.*\.)?(replicas|numNodes|elasticPolicy)(\..*)?", "cluster.job.nodes"),
    (r"spec\.parallelTrialCount", "cluster.job.parallel_trials"),
    (r"spec\.maxFailedTrialCount", "cluster.job.failed_trials"),
    (r"spec\.maxTrialCount", "tune.trials"),
    (r"spec\.algorithm(\..*)?", "tune.sampler"),
    (r"spec\.earlyStopping(\..*)?", "tune.pruner"),
    (r"spec\.objective\.goal", "cluster.job.goal"),
    (r"spec\.objective(\..*)?", "tune.metric"),
    (r"spec\.parameters\.(?P<rest>.+)", "tune.space.{rest}"),
    (r"(spec\.parameters|spec\.trialTemplate\.trialParameters)(\..*)?", "tune.space"),
    (r"(.*\.)?args", "cluster.store"),
    (r"(.*\.)?Master(\..*)?", "cluster.job.master"),
)
_COMPILED = tuple((re.compile(pattern), key) for pattern, key in _KEYS)


def key_of(path: str) -> str:
    """The key of params.yaml that a field of an object comes from; empty if it comes from none."""
    for pattern, key in _COMPILED:
        found = pattern.fullmatch(path)
        if found:
            return key.format(**found.groupdict())
    return ""


def problems(obj: dict[str, Any], *, restricted: bool = True) -> Iterator[shapes.Problem]:
    """What the rules say about an object, without a look at its shape.

    Args:
        obj: the object.
        restricted: whether its namespace enforces the policy restricted.
    """
    kind = str(obj.get("kind"))
    yield from rules.of_name(obj, limit=names.MAX_EXPERIMENT if kind == "Experiment" else names.MAX_NAME)
    yield from _of_kind(obj, kind, restricted)


def _of_kind(obj: dict[str, Any], kind: str, restricted: bool) -> Iterator[shapes.Problem]:
    if kind == "Experiment":
        yield from katib_rules.of_experiment(obj, lambda trial: _of_kind(trial, str(trial.get("kind")), restricted))
        return
    yield from rules.of_pods(obj, restricted)
    if kind == "PyTorchJob":
        yield from rules.of_pytorchjob(obj, restricted)
    elif kind == "Job":
        yield from rules.of_job(obj)
    elif kind == "TrainJob":
        yield from rules.of_trainjob(obj)
    elif kind == "TrainingRuntime":
        yield from rules.of_runtime(obj)


def lines(obj: dict[str, Any], found: Sequence[shapes.Problem]) -> list[str]:
    """`cluster.job.nodes: what is wrong (PyTorchJob spec.elasticPolicy.minReplicas)`."""
    told = []
    for path, what in dict.fromkeys(found):
        key = key_of(path)
        told.append(f"{key}: {what} ({obj.get('kind')} {path})" if key else f"{obj.get('kind')} {path}: {what}")
    return told


def check(objects: Sequence[dict[str, Any]], *, restricted: bool = True, shape: bool = True) -> None:
    """Refuse objects that the cluster would refuse, or would take and never run.

    Args:
        objects: what was rendered.
        restricted: whether the namespace enforces the policy restricted.
        shape: also compare with the models, here and now; a launcher calls `check_apart`.

    Raises:
        ConfigError: with one line for each thing that is wrong, which begins with the key of params.yaml.
    """
    told = []
    for obj in objects:
        found = (shapes.unlike(obj) if shape else []) or _ruled(obj, restricted)
        told += lines(obj, found)
    _refuse(told)


def _ruled(obj: dict[str, Any], restricted: bool) -> list[shapes.Problem]:
    return list(problems(obj, restricted=restricted))


def _refuse(told: Sequence[str]) -> None:
    if told:
        raise ConfigError("\n  ".join(told), "correct params.yaml; `millrace config` tells what each key takes")


def check_apart(objects: Sequence[dict[str, Any]], *, restricted: bool = True, timeout_s: float = 120.0) -> None:
    """`check` in a process of its own, whose models are gone from memory when it ends.

    Raises:
        ConfigError: as `check`.
    """
    asked = json.dumps({"objects": list(objects), "restricted": restricted})
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=asked, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    if done.returncode == EXIT_BAD_INPUT:
        _refuse(done.stdout.splitlines())
    if done.returncode != EXIT_OK:
        raise RuntimeError(f"{__spec__.name} ended with {done.returncode}: {done.stderr[-2000:]}")


def main() -> int:
    """Check what stands on stdin."""
    asked: Mapping[str, Any] = json.load(sys.stdin)
    try:
        check(asked["objects"], restricted=asked.get("restricted", True))
    except ConfigError as error:
        print(error.message.replace("\n  ", "\n"))
        return EXIT_BAD_INPUT
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
