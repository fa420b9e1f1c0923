"""Container components, made from the stage table: each runs `python -m trainer STAGE --executor-input '{{$}}'`, or
`python -m components.launch` with the same words, where the stage is a job of the cluster.

A component's inputs are the artifacts of its stage, the sections of params.yaml that the stage reads, each as JSON text
(so that KFP's cache key holds what the stage reads and nothing else), the data's version and the store.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from kfp import dsl

from components.table import KINDS, LAUNCHER, TASKS, Task, compiled, describe, image
from trainer.config import Params
from trainer.executor import SECTION
from trainer.stage import STAGES

COMMAND = ["python", "-m", "trainer"]
LAUNCH = ["python", "-m", "components.launch"]
# Section `cluster` as it is compiled in: no input of the pipeline, so nothing that the run form could say otherwise.
CLUSTER = SECTION.format("cluster")
SECTIONS = tuple(section for section in Params.model_fields if section != "cluster")
# What a launcher reads beside its stage's sections: a trial that is a job of its own may train on several nodes, and a model
# whose parameters are searched is not checked before they are known.
LAUNCHED_READS = {"tune": "parallel", "train": "tune"}
# What `configure` puts out beside the sections: name -> what it says.
FOUND = {
    "data_version": "version of the raw data: DVC's md5 of it",
    "proceed": "true unless there is nothing new to train on",
    "train_nodes": "pods that train together",
    **{
        f"{name}_gpus": f"accelerators for {name}; 0 if it is switched off"
        for name, task in TASKS.items()
        if task.accelerated
    },
}
# The pipeline's inputs: name -> type, default and help, in the order of the run form.
RUN_FORM: dict[str, tuple[type, Any, str]] = {
    "preset": (
        str,
        "text-classify",
        "a complete configuration by its name: text-classify, code-lm; empty if `params` is given",
    ),
    "params": (str, "", "a complete configuration as the text of a params.yaml; empty if `preset` is given"),
    "data": (
        str,
        "",
        "raw data in place of the configuration's: s3://..., dvc:REPO@REV:PATH, builtin:NAME or a mounted path",
    ),
    "overrides": (str, "", "changes to it, such as train.lr=1e-3 tune.trials=20; they win over all other inputs"),
    "trials": (int, 0, "trials of the search; 0 keeps tune.trials"),
    "nodes": (int, 1, "nodes to train on; more than 1 takes a pipeline compiled with cluster.job.train=pytorchjob"),
    "gpus_per_node": (int, 0, "GPUs of each node; 0 trains on CPUs"),
    "store": (
        str,
        "",
        "URI or mounted path where large artifacts go by reference; empty sends them through KFP's own store",
    ),
    "registry": (str, "", "URI or mounted path of the model registry, as promote.registry"),
    "only_if_new": (
        bool,
        False,
        "end early, successfully, if the champion was trained on the same version of the data",
    ),
}
_COMPILED = "section cluster of params.yaml as it was compiled in, as JSON"


def inputs_of(task: Task) -> Iterator[tuple[str, Any, Any, str]]:
    """Name, annotation, default and help of each input of a task; `inspect.Parameter.empty` for no default."""
    none = inspect.Parameter.empty
    if task.name == "configure":
        for name, (kind, default, text) in RUN_FORM.items():
            yield name, kind, default, text
        yield "scheduled_at", str, "", "time of the schedule's slot; empty for a run started by hand"
        yield CLUSTER, str, "{}", _COMPILED
    elif task.name == "finish":
        yield "store", str, "", RUN_FORM["store"][2]
        yield "run_name", str, "", "name of the run"
        yield "run_id", str, "", "id of the run"
        yield "status", dsl.PipelineTaskFinalStatus, none, "how the run ended"
    else:
        stage = STAGES[task.name]
        for port, spec in stage.inputs.items():
            yield port, dsl.Input[artifact(spec.kind)], None if spec.optional else none, spec.help
        for section in sections_of(task):
            yield SECTION.format(section), str, "{}", f"section {section} of params.yaml, as JSON"
        yield "data_version", str, "", FOUND["data_version"]
        yield "store", str, "", RUN_FORM["store"][2]
        if task.accelerated:
            yield "gpus", str, "0", "accelerators of the pod"
        if task.launches:
            yield "gpus", str, "0", "accelerators of each of the job's pods"
            yield "nodes", str, "1", FOUND["train_nodes"]
            yield CLUSTER, str, "{}", _COMPILED


def sections_of(task: Task) -> tuple[str, ...]:
    """The sections of params.yaml that a stage's task reads."""
    sections = STAGES[task.name].sections
    return (*sections, LAUNCHED_READS[task.name]) if task.launches else sections


def outputs_of(task: Task) -> Iterator[tuple[str, Any, str]]:
    """Name, annotation and help of each output of a task."""
    if task.name == "configure":
        for section in SECTIONS:
            yield (
                SECTION.format(section),
                dsl.OutputPath(str),
                f"section {section} of the checked configuration, as JSON",
            )
        for name, text in FOUND.items():
            yield name, dsl.OutputPath(str), text
    elif task.name != "finish":
        for port, spec in STAGES[task.name].outputs.items():
            yield port, dsl.Output[artifact(spec.kind)], spec.help
    for view, kind in task.views.items():
        yield view, dsl.Output[getattr(dsl, kind)], f"{kind} for the run page"


def artifact(kind: str) -> Any:
    """The class of kfp.dsl for an artifact's kind."""
    return getattr(dsl, KINDS.get(kind, "Artifact"))


def component(task: Task, params: Params) -> Any:
    """The container component of a task, with the image and the retries that params.yaml's `cluster` names."""
    words = [task.name]
    if task.name in STAGES and params.cluster.retries and not task.launches:
        words += ["--retries", str(params.cluster.retries), "--backoff", f"{params.cluster.backoff_s:g}"]
    if task.name == "promote":
        words.append("--allow-refusal")
    words += ["--executor-input", "{{$}}"]
    inputs, outputs = list(inputs_of(task)), list(outputs_of(task))

    def function(*_: Any, **__: Any) -> dsl.ContainerSpec:
        command = LAUNCH if task.image == LAUNCHER else COMMAND
        return dsl.ContainerSpec(image=image(task, params), command=list(command), args=list(words))

    required = [each for each in inputs if each[2] is inspect.Parameter.empty]
    optional = [each for each in inputs if each[2] is not inspect.Parameter.empty]
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    ordered = [
        *(inspect.Parameter(name, keyword, annotation=kind) for name, kind, _, _ in required),
        *(inspect.Parameter(name, keyword, annotation=kind) for name, kind, _ in outputs),
        *(inspect.Parameter(name, keyword, annotation=kind, default=value) for name, kind, value, _ in optional),
    ]
    helps = [(name, text) for name, _, _, text in inputs] + [(name, text) for name, _, text in outputs]
    function.__name__ = task.name
    function.__doc__ = "\n".join([describe(task), "", "Args:", *(f"    {name}: {text}" for name, text in helps)])
    function.__annotations__ = {each.name: each.annotation for each in ordered}
    function.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    return dsl.container_component(function)


def components(params: Params) -> dict[str, Any]:
    """All container components by the name of their task."""
    return {name: component(task, params) for name, task in compiled(params).items()}
