"""A search as a Katib Experiment (kubeflow.org/v1beta1, Katib 0.19), from the same `tune.space` as the local search.

Katib puts the values of a trial into the text of its template, joins the words of the command with spaces and runs them
with `sh -c`: everything here is plain words, or it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from components.launch import batchjob, names, pods, pytorchjob, trainjob
from components.launch.security import pod_specs
from components.launch.spec import JobSpec, check_processes, stage
from trainer.config import Params
from trainer.config.stages import Dimension, Tune
from trainer.config.text import parse_value
from trainer.errors import ConfigError
from trainer.tune import space

ALGORITHMS = {"grid": "grid", "random": "random", "tpe": "tpe", "gp": "bayesianoptimization"}
PLAIN = re.compile(r"[A-Za-z0-9_.,:/=@%+-]+")
# The values of a stepped dimension are listed one by one.
MAX_VALUES = 1000
# How Katib tells a trial's end from the status of its job (in GJSON).
_ENDED = 'status.conditions.#(type=="{}")#|#(status=="True")#'
_FIRST_POD = {"training.kubeflow.org/replica-type": "worker", "training.kubeflow.org/replica-index": "0"}
_MASTER_POD = {"training.kubeflow.org/replica-type": "master"}
_FIRST_NODE = {"jobset.sigs.k8s.io/replicatedjob-name": trainjob.REPLICATED_JOB, trainjob.INDEX_LABEL: "0"}


def experiment(
    params: Params,
    *,
    name: str,
    namespace: str = "",
    args: Sequence[str],
    owner: Mapping[str, Any] | None = None,
    run: str = "",
    gpus: int | None = None,
    nodes: int | None = None,
    restricted: bool = True,
) -> list[dict[str, Any]]:
    """The objects of a search, in the order in which they are to be made; the Experiment is the last.

    A trial is of the kind that cluster.job.train names: a Job of one pod, a PyTorchJob, or a TrainJob, whose
    TrainingRuntime is then the first object.

    Args:
        params: the configuration.
        name: of the Experiment, at most 40 characters.
        namespace: where it runs.
        args: words after `python -m trainer` of each trial; `key=value` of each dimension follows.
        owner: ownerReference of what it goes away with.
        run: the run that it belongs to.
        gpus: accelerators of each pod; None takes cluster.gpus_per_node.
        nodes: pods of a trial; None takes cluster.job.nodes. A Job has one.
        restricted: whether the namespace enforces the policy restricted, see `no_early_stopping`.

    Raises:
        ConfigError: Katib cannot search this space with this algorithm, or a word is not plain.
    """
    names.check_name(name, limit=names.MAX_EXPERIMENT)
    check_words(args, "args")
    kind, tune, job = params.cluster.job.train, params.tune, params.cluster.job
    count = 1 if kind == "pod" else nodes or job.nodes
    spec = stage(
        params, "tune", name=name, namespace=namespace, args=args, gpus=gpus, nodes=count, owner=owner, run=run
    )
    spec = replace(spec, master=job.master)
    check_processes(spec)
    before, template = _trial(spec, kind)
    placeholders = {key: f"p{index}" for index, key in enumerate(tune.space)}
    words = [f"{key}=${{trialParameters.{short}}}" for key, short in placeholders.items()]
    for pod in pod_specs(template["trialSpec"]):
        pod["containers"][0]["args"] += words
    if kind == "trainjob":
        template["trialSpec"]["spec"]["trainer"]["args"] += words
    trials = min(tune.trials, space.grid_size(tune)) if tune.sampler == "grid" else tune.trials
    body: dict[str, Any] = {
        "objective": _objective(tune, job.goal),
        "algorithm": _algorithm(tune),
        **({} if no_early_stopping(tune, restricted) else _early_stopping(tune)),
        "parallelTrialCount": min(job.parallel_trials, trials),
        "maxTrialCount": trials,
        "maxFailedTrialCount": min(job.failed_trials, trials),
        "resumePolicy": "Never",
        "parameters": [_parameter(tune, key) for key in tune.space],
        "metricsCollectorSpec": {"collector": {"kind": "StdOut"}},
        "trialTemplate": {
            **template,
            "retain": job.retain,
            "trialParameters": [
                {"name": short, "reference": key, "description": key} for key, short in placeholders.items()
            ],
        },
    }
    made = pods.finished({"apiVersion": "kubeflow.org/v1beta1", "kind": "Experiment", "spec": body}, spec)
    made["metadata"]["labels"].pop(pods.QUEUE_LABEL, None)
    return [*before, made]


def assigned(tune: Tune, assignments: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What Katib found (`currentOptimalTrial.parameterAssignments`) as values of the search space.

    Raises:
        ConfigError: an assignment is none of the space's.
    """
    found: dict[str, Any] = {}
    for each in assignments:
        key, text = each["name"], each["value"]
        if key not in tune.space:
            raise ConfigError(
                f"tune.space.{key}: the Experiment searches it, params.yaml does not", "remove the Experiment"
            )
        kind = tune.space[key].type
        if kind == "categorical":
            found[key] = parse_value(text, f"tune.space.{key}")
        else:
            found[key] = int(float(text)) if kind == "int" else float(text)
    return {key: found[key] for key in tune.space if key in found}


def check_words(words: Sequence[str], what: str) -> None:
    """Refuse what a shell would not leave as it is.

    Raises:
        ConfigError: a word is not plain.
    """
    for word in words:
        if not PLAIN.fullmatch(word):
            message = f"{what}: {word!r} reaches a trial through a shell, which would change it"
            raise ConfigError(message, "use letters, digits and _ . , : / = @ % + - only")


def _trial(spec: JobSpec, kind: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What is to be made before the Experiment, and the part of its trialTemplate that is about a trial's kind."""
    # The Trial owns its job, and Katib must see how it ended: neither an owner nor a time to live of its own.
    bare = replace(spec, owner=None, ttl_s=None)
    makers: dict[str, tuple[Callable[[JobSpec], dict[str, Any]], str, str, dict[str, str]]] = {
        "pod": (batchjob.job, batchjob.CONTAINER, "Complete", {}),
        "pytorchjob": (
            pytorchjob.pytorchjob, pytorchjob.CONTAINER, "Succeeded", _MASTER_POD if spec.master else _FIRST_POD,
        ),
        "trainjob": (lambda each: trainjob.trainjob(each)[1], trainjob.CONTAINER, "Complete", _FIRST_NODE),
    }  # fmt: skip
    make, container, success, first = makers[kind]
    made = make(bare)
    metadata = {"labels": made["metadata"]["labels"]}
    template: dict[str, Any] = {
        "primaryContainerName": container,
        **({"primaryPodLabels": first} if first else {}),
        "successCondition": _ENDED.format(success),
        "failureCondition": _ENDED.format("Failed"),
        "trialSpec": {**made, "metadata": metadata},
    }
    return [trainjob.runtime(spec)] if kind == "trainjob" else [], template


def _objective(tune: Tune, goal: float | None) -> dict[str, Any]:
    # As the local search: a trial is worth its best evaluation, which is the one whose model is kept.
    strategy = {"name": tune.metric, "value": "max" if tune.direction == "maximize" else "min"}
    found = {"type": tune.direction, "objectiveMetricName": tune.metric, "metricStrategies": [strategy]}
    return found if goal is None else {**found, "goal": goal}


def _algorithm(tune: Tune) -> dict[str, Any]:
    name = ALGORITHMS[tune.sampler]
    settings = [{"name": "random_state", "value": str(tune.seed)}]
    if tune.sampler == "gp":
        settings.append({"name": "n_initial_points", "value": str(max(2, min(10, tune.trials // 2)))})
    return {"algorithmName": name, "algorithmSettings": settings}


def no_early_stopping(tune: Tune, restricted: bool) -> str:
    """Why a search goes without its early stopping; empty if it does not.

    Katib 0.19 gives the pod of its early stopping no security context, and has no setting for one: where Pod Security
    enforces restricted, the Experiment would wait for that pod for ever.
    """
    if tune.pruner != "median" or not restricted:
        return ""
    return "tune.pruner: median is left out: Katib's early stopping cannot run where Pod Security enforces restricted"


def _early_stopping(tune: Tune) -> dict[str, Any]:
    """Katib's median stop; it has no Hyperband that stops trials (its algorithm of that name is a search)."""
    if tune.pruner == "none":
        return {}
    if tune.pruner == "hyperband":
        raise ConfigError("tune.pruner: Katib cannot stop trials as hyperband does", "set tune.pruner=median or none")
    settings = {"min_trials_required": max(2, min(5, tune.trials // 3)), "start_step": 2}
    rows = [{"name": name, "value": str(value)} for name, value in settings.items()]
    return {"earlyStopping": {"algorithmName": "medianstop", "algorithmSettings": rows}}


def _parameter(tune: Tune, key: str) -> dict[str, Any]:
    """A dimension as Katib writes it: all values are texts."""
    dimension, path = tune.space[key], f"tune.space.{key}"
    if dimension.type == "categorical" or dimension.step is not None or tune.sampler == "grid":
        return {"name": key, **_listed(path, dimension, space.grid_values(key, dimension))}
    if tune.sampler == "gp" and dimension.log != (dimension.type == "float"):
        usual = "on a logarithmic scale" if dimension.type == "float" else "evenly"
        message = f"{path}.log: Katib's bayesianoptimization draws a {dimension.type} {usual} whatever is asked for"
        raise ConfigError(message, f"set {path}.log={str(not dimension.log).lower()}, or tune.sampler=tpe")
    whole = dimension.type == "int"
    bounds = {end: _text(value, whole) for end, value in (("min", dimension.low), ("max", dimension.high))}
    scale = {"distribution": "logUniform" if dimension.log else "uniform"}
    return {"name": key, "parameterType": "int" if whole else "double", "feasibleSpace": {**bounds, **scale}}


def _text(value: float | None, whole: bool) -> str:
    assert value is not None
    return str(int(value)) if whole else repr(float(value))


def _listed(path: str, dimension: Dimension, values: Sequence[Any]) -> dict[str, Any]:
    """All values of a dimension. A step is listed as well: Katib counts steps from 0, not from `low`."""
    if len(values) > MAX_VALUES:
        raise ConfigError(f"{path}.step: makes {len(values)} values, more than {MAX_VALUES}", "use a larger step")
    texts = []
    for value in values:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if not PLAIN.fullmatch(text):
            message = f"{path}.choices: {text!r} reaches a trial through a shell, which would change it"
            raise ConfigError(message, "use letters, digits and _ . , : / = @ % + - only")
        read = parse_value(text, path)
        if read != value:
            message = f"{path}.choices: the text {text!r} would reach a trial as {type(read).__name__} {read!r}"
            raise ConfigError(message, "use another name for it, or search with cluster.job.tune=pod")
        texts.append(text)
    kind = "categorical" if dimension.type == "categorical" else "discrete"
    return {"parameterType": kind, "feasibleSpace": {"list": texts}}
