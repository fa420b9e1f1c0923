"""What each task of the pipeline is in containers: its image, resources, caching and what its run page shows.

One row per stage of `trainer.stage.STAGES`, and two around the chain: `configure` checks what the run form says,
`finish` cleans up and notifies. A stage that is switched off is a task all the same, which passes its input on and asks
for no accelerator: a branch in the graph would cost two pods more than the stage that it saves, and artifacts of
branches can be joined from KFP 2.17 on only. Whether training and search are jobs of the cluster (params.yaml's
cluster.job) is compiled in for the same reason: their tasks then start the job and wait. Imports no kfp.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from trainer.config import Params
from trainer.config.cluster import Resources
from trainer.stage import STAGES

# Artifact kinds of trainer/stage.py -> artifact classes of kfp.dsl.
KINDS = {"dataset": "Dataset", "model": "Model"}


@dataclass(frozen=True)
class Task:
    """A row of the table.

    Attributes:
        name: the word after `python -m trainer` or `python -m components.launch`, and what the run page and
            `millrace status` call it.
        image: data, trainer or launcher.
        resources: requests, where params.yaml's cluster.resources says nothing else.
        cached: whether KFP may reuse an earlier result with the same inputs; never where the stage reads a registry.
        accelerated: whether it gets the accelerators of pipeline input gpus_per_node.
        views: further outputs: name -> class of kfp.dsl that the run page shows.
        launches: whether its work is a job of the cluster, which it starts and waits for.
    """

    name: str
    image: str
    resources: Resources
    cached: bool = True
    accelerated: bool = False
    views: dict[str, str] = field(default_factory=dict)
    launches: bool = False


LAUNCHER = "launcher"
_WAITING = Resources(cpu="50m", memory="128Mi")
_LIGHT = Resources(cpu="100m", memory="512Mi")
_MEDIUM = Resources(cpu="1", memory="2Gi")
_HEAVY = Resources(cpu="2", memory="4Gi")
_SUMMARY = {"summary": "Markdown"}
_FIGURES = {"metrics": "Metrics", **_SUMMARY}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("configure", "data", _MEDIUM, cached=False, views=_SUMMARY),
        Task("preprocess", "data", _HEAVY, views=_FIGURES),
        Task("tune", "trainer", _HEAVY, accelerated=True, views={"search": "HTML", **_FIGURES}),
        Task("train", "trainer", _HEAVY, accelerated=True, views=_FIGURES),
        Task("distill", "trainer", _HEAVY, accelerated=True, views=_FIGURES),
        Task("quantize", "trainer", _HEAVY, views=_FIGURES),
        Task(
            "evaluate", "trainer", _HEAVY, cached=False,
            views={"report": "HTML", "confusion": "ClassificationMetrics", "roc": "ClassificationMetrics", **_FIGURES},
        ),
        Task("promote", "data", _LIGHT, cached=False, views=_FIGURES),
        Task("finish", "data", _LIGHT, cached=False),
    )
}  # fmt: skip

HELP = {
    "configure": "check preset, parameters and overrides, find the data's version, and tell whether there is anything to do",
    "finish": "clean up and tell people how the run ended",
}


def describe(task: Task) -> str:
    """A sentence on what a task does."""
    text = HELP.get(task.name) or STAGES[task.name].help
    return f"{text[0].upper()}{text[1:]}."


def compiled(params: Params) -> dict[str, Task]:
    """The table as the pipeline has it: what params.yaml's `cluster.job` makes a job of the cluster is a task that waits.

    `finish` then deletes what the run has launched: a step that is cancelled has no time to.
    """
    rows = dict(TASKS)
    for name in params.cluster.job.launched:
        rows[name] = replace(rows[name], image=LAUNCHER, resources=_WAITING, accelerated=False, launches=True)
    if rows != TASKS:
        rows["finish"] = replace(rows["finish"], image=LAUNCHER)
    return rows


def image(task: Task, params: Params) -> str:
    """Name of the image that a task runs in."""
    from trainer import __version__

    return f"{params.cluster.image_prefix}/{task.image}:{params.cluster.image_tag or __version__}"


def resources(task: Task, params: Params) -> Resources:
    """What a task asks for: its own row, with what params.yaml's cluster.resources says for its stage.

    Of a stage that is launched, cluster.resources speaks of the job's pods, not of the step that waits for them.
    """
    if task.launches:
        return task.resources
    asked = params.cluster.resources.get(task.name, Resources())
    return Resources(cpu=asked.cpu or task.resources.cpu, memory=asked.memory or task.resources.memory)
