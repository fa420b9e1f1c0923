"""The training pipeline: wiring only. What each task is stands in components/table.py, how it is placed in place.py."""

import json
from typing import Any

from kfp import dsl

from components.build import CLUSTER, RUN_FORM, components, sections_of
from components.place import place
from components.table import compiled
from trainer.config import Params
from trainer.executor import SECTION

NAME = "millrace"
HELP = "Raw data in, a tuned, trained, distilled, quantised, evaluated and promoted model out."


def training(config: Params, form: dict[str, Any]) -> Any:
    """The pipeline, with images, rights and retries as params.yaml's `cluster` says; all else is a pipeline input.

    `form` has the defaults of the inputs `preset` and `params`, one of which is empty.
    """
    made, rows = components(config), compiled(config)
    cluster = {CLUSTER: json.dumps(config.cluster.model_dump(mode="json", exclude_defaults=True), sort_keys=True)}

    def pipeline(
        preset: str = form["preset"], params: str = form["params"], data: str = "", overrides: str = "", trials: int = 0,
        nodes: int = config.cluster.job.nodes, gpus_per_node: int = config.cluster.gpus_per_node,
        store: str = config.cluster.store, registry: str = "", only_if_new: bool = False,
    ) -> None:  # fmt: skip
        def task(name: str, **inputs: Any) -> Any:
            return place(made[name](**inputs), rows[name], config, inputs.get("gpus"))

        def stage(name: str, **artifacts: Any) -> Any:
            row, more = rows[name], {}
            sections = {SECTION.format(section): plan[SECTION.format(section)] for section in sections_of(row)}
            if row.accelerated or row.launches:
                more["gpus"] = plan[f"{name}_gpus"]
            if row.launches:
                more |= {"nodes": plan["train_nodes"], **cluster}
            return task(name, **artifacts, **sections, **more, data_version=plan["data_version"], store=store).outputs

        finish = task(
            "finish", store=store, run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
        )
        with dsl.ExitHandler(finish, name="chain"):
            plan = task(
                "configure", preset=preset, params=params, data=data, overrides=overrides, trials=trials, nodes=nodes,
                gpus_per_node=gpus_per_node, store=store, registry=registry, only_if_new=only_if_new,
                scheduled_at=dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER, **cluster,
            ).outputs  # fmt: skip
            with dsl.If(plan["proceed"] == "true", name="something new"):
                dataset = stage("preprocess")["dataset"]
                tuning = stage("tune", dataset=dataset)["tuning"]
                model = stage("train", dataset=dataset, tuning=tuning)["model"]
                student = stage("distill", dataset=dataset, model=model)["student"]
                quantized = stage("quantize", dataset=dataset, student=student)["quantized"]
                models = {"model": model, "student": student, "quantized": quantized}
                evaluation = stage("evaluate", dataset=dataset, tuning=tuning, **models)["evaluation"]
                stage("promote", dataset=dataset, quantized=quantized, evaluation=evaluation)

    pipeline.__doc__ = "\n".join(
        [HELP, "", "Args:", *(f"    {name}: {text}" for name, (_, _, text) in RUN_FORM.items())]
    )
    return dsl.pipeline(name=NAME, display_name=NAME, description=HELP)(pipeline)
