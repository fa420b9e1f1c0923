"""Katib's webhook and what its search services demand, as rules of our own; see rules.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from components.launch import names
from components.launch.experiment import PLAIN
from components.launch.rules import TRIAL, suffix
from components.launch.security import pod_specs

Problem = tuple[str, str]
_ALGORITHMS = {
    "random",
    "tpe",
    "grid",
    "multivariate-tpe",
    "bayesianoptimization",
    "cmaes",
    "sobol",
    "hyperband",
    "pbt",
}
_KINDS = {"StdOut", "File", "TensorFlowEvent", "PrometheusMetric", "Custom", "Push"}
_TYPES = {"int", "double", "categorical", "discrete"}
_SCALES = {"uniform", "logUniform", "normal", "logNormal"}
_PLACE = re.compile(r"\$\{trialParameters\.(.+?)\}")
_META = re.compile(r"\$\{trialSpec\..+\}")


def of_experiment(obj: Mapping[str, Any], of_trial: Callable[[dict[str, Any]], Iterator[Problem]]) -> Iterator[Problem]:
    """Everything about an Experiment.

    Args:
        obj: the Experiment.
        of_trial: the rules of what a trial runs; told the object with a name as long as Katib makes it.
    """
    spec = obj.get("spec") or {}
    yield from _of_counts(spec)
    objective = spec.get("objective") or {}
    if objective.get("type") not in ("minimize", "maximize"):
        yield "spec.objective.type", f"must be minimize or maximize (given {objective.get('type')!r})"
    if not objective.get("objectiveMetricName"):
        yield "spec.objective.objectiveMetricName", "must be given"
    if objective.get("objectiveMetricName") in (objective.get("additionalMetricNames") or []):
        yield "spec.objective.additionalMetricNames", "must not hold the objective itself"
    algorithm = (spec.get("algorithm") or {}).get("algorithmName")
    if algorithm not in _ALGORITHMS:
        yield "spec.algorithm", f"must be one of {', '.join(sorted(_ALGORITHMS))} (given {algorithm!r})"
    stopping = spec.get("earlyStopping")
    if stopping is not None and stopping.get("algorithmName") != "medianstop":
        yield "spec.earlyStopping", f"must be medianstop (given {stopping.get('algorithmName')!r})"
    collector = ((spec.get("metricsCollectorSpec") or {}).get("collector") or {}).get("kind", "StdOut")
    if collector not in _KINDS:
        yield "spec.metricsCollectorSpec.collector.kind", f"must be one of {', '.join(sorted(_KINDS))}"
    if not spec.get("parameters"):
        yield "spec.parameters", "there is nothing to search"
    for row in spec.get("parameters") or []:
        yield from _of_parameter(row, str(algorithm))
    yield from _of_template(obj, of_trial)


def _of_counts(spec: Mapping[str, Any]) -> Iterator[Problem]:
    most = spec.get("maxTrialCount")
    for key, least in (("maxTrialCount", 1), ("parallelTrialCount", 1), ("maxFailedTrialCount", 0)):
        value = spec.get(key)
        if value is not None and value < least:
            yield f"spec.{key}", f"must be at least {least} (given {value})"
        if value is not None and most is not None and value > most:
            yield f"spec.{key}", f"must be at most the number of trials, {most} (given {value})"
    if spec.get("resumePolicy", "Never") not in ("Never", "LongRunning", "FromVolume"):
        yield "spec.resumePolicy", f"{spec['resumePolicy']!r} is none of Never, LongRunning, FromVolume"


def _of_parameter(row: Mapping[str, Any], algorithm: str) -> Iterator[Problem]:
    path, kind, feasible = (
        f"spec.parameters.{row.get('name')}",
        row.get("parameterType"),
        row.get("feasibleSpace") or {},
    )
    scale = feasible.get("distribution", "uniform")
    if kind not in _TYPES:
        yield path, f"parameterType must be one of {', '.join(sorted(_TYPES))} (given {kind!r})"
    if scale not in _SCALES:
        yield f"{path}.log", f"distribution must be one of {', '.join(sorted(_SCALES))} (given {scale!r})"
    if kind in ("categorical", "discrete"):
        if not feasible.get("list") or {"min", "max", "step"} & set(feasible):
            yield path, "must have a list, and neither min, max nor step"
        return
    if "list" in feasible or not {"min", "max"} <= set(feasible):
        yield path, "must have min and max, and no list"
        return
    if float(feasible["min"]) >= float(feasible["max"]):
        yield f"{path}.low", f"{feasible['min']} must be below {feasible['max']}"
    if algorithm in ("cmaes", "sobol") and scale != "uniform":
        yield f"{path}.log", f"{algorithm} draws evenly, whatever the distribution says"
    if algorithm == "bayesianoptimization" and (scale == "logUniform") != (kind == "double"):
        yield (
            f"{path}.log",
            f"{algorithm} draws doubles on a logarithmic scale and whole numbers evenly, whatever it says",
        )
    if algorithm == "grid" and kind == "double" and not feasible.get("step"):
        yield f"{path}.step", "a grid needs a step"


def _of_template(obj: Mapping[str, Any], of_trial: Callable[[dict[str, Any]], Iterator[Problem]]) -> Iterator[Problem]:
    spec, path = obj.get("spec") or {}, "spec.trialTemplate"
    template = spec.get("trialTemplate") or {}
    for key in ("primaryContainerName", "successCondition", "failureCondition", "trialParameters", "trialSpec"):
        if not template.get(key):
            yield f"{path}.{key}", "must be given"
    trial = template.get("trialSpec") or {}
    metadata = trial.get("metadata") or {}
    for key in ("name", "namespace"):
        if metadata.get(key):
            yield f"{path}.trialSpec.metadata.{key}", "must be left out: Katib sets it"
    rows = template.get("trialParameters") or []
    yield from _of_placeholders(rows, {row.get("name") for row in spec.get("parameters") or []}, json.dumps(trial))
    containers = [each.get("name") for pod in pod_specs(trial) for each in pod["containers"]]
    if containers and template.get("primaryContainerName") not in containers:
        yield f"{path}.primaryContainerName", f"is none of {', '.join(map(str, containers))}"
    for words in _commands(trial):
        if words[:2] not in (["sh", "-c"], ["bash", "-c"]):
            for word in words:
                if not PLAIN.fullmatch(_PLACE.sub("x", word)):
                    yield f"{path}.trialSpec.args", f"{word!r} reaches the trial through a shell, which would change it"
    name = (obj.get("metadata") or {}).get("name") or ""
    if trial:
        named = {**trial, "metadata": {**metadata, "name": f"{name[: names.MAX_EXPERIMENT]}{TRIAL}"}}
        if len(named["metadata"]["name"] + suffix(named)) > names.MAX_NAME:
            over = len(named["metadata"]["name"] + suffix(named)) - names.MAX_NAME
            yield "metadata.name", f"{name!r} is {over} characters too long for the pods of trials"
        yield from ((f"{path}.trialSpec.{where}", what) for where, what in of_trial(named))


def _of_placeholders(rows: list[dict[str, Any]], known: set[Any], text: str) -> Iterator[Problem]:
    """Every trialParameter is declared once, refers to a parameter, and is used; nothing else is used."""
    path, used = "spec.trialTemplate.trialParameters", set(_PLACE.findall(text))
    declared: list[str] = [str(row.get("name")) for row in rows]
    for row in rows:
        name, reference = str(row.get("name")), str(row.get("reference"))
        if not row.get("name") or not row.get("reference") or set("{}") & set(name):
            yield f"{path}.{name}", "name and reference must be given, without { and }"
        if reference not in known and not _META.fullmatch(reference):
            yield f"{path}.{name}", f"refers to {reference!r}, which is no parameter"
        if name not in used:
            yield f"{path}.{name}", "is not used by the trial"
    for name in sorted({each for each in declared if declared.count(each) > 1}):
        yield f"{path}.{name}", "is declared twice"
    for name in sorted(used - set(declared)):
        yield f"{path}.{name}", "is used by the trial, and not declared"


def _commands(trial: Mapping[str, Any]) -> Iterator[list[str]]:
    """The words that run in a trial."""
    holders = [pod["containers"][0] for pod in pod_specs(trial)]
    holders += [trainer] if (trainer := (trial.get("spec") or {}).get("trainer")) else []
    for each in holders:
        yield [*(each.get("command") or []), *(each.get("args") or [])]
