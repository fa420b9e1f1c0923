"""The training pipeline: wiring only. What each task is stands in components/table.py, how it is placed in place.py."""

from typing import Any

from kfp import dsl

from components.build import components
from components.place import place
from components.table import TASKS
from trainer.config import Params
from trainer.executor import SECTION
from trainer.stage import STAGES

NAME = "millrace"


def training(config: Params) -> Any:
    """The pipeline, with images, rights and retries as params.yaml's `cluster` says; all else is a pipeline input."""
    made = components(config)

    @dsl.pipeline(name=NAME, description="Raw data in, a tuned, trained, distilled, quantised, evaluated and promoted model out.")
    def pipeline(
        preset: str = "text-classify", params: str = "", data: str = "", overrides: str = "", trials: int = 0,
        nodes: int = 1, gpus_per_node: int = 0, store: str = "", registry: str = "", only_if_new: bool = False,
    ) -> None:  # fmt: skip
        def task(name: str, **inputs: Any) -> Any:
            return place(made[name](**inputs), TASKS[name], config, gpus_per_node)

        def step(name: str, **artifacts: Any) -> dict[str, Any]:
            sections = {SECTION.format(each): plan[SECTION.format(each)] for each in STAGES[TASKS[name].stage].sections}
            found = task(name, **sections, data_version=plan["data_version"], store=store, **artifacts).outputs
            return dict(found)

        finish = task("finish", store=store, run_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
        with dsl.ExitHandler(finish, name="chain"):
            plan = task(
                "configure", preset=preset, params=params, data=data, overrides=overrides, trials=trials, nodes=nodes,
                gpus_per_node=gpus_per_node, store=store, registry=registry, only_if_new=only_if_new,
                scheduled_at=dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER,
            ).outputs  # fmt: skip
            with dsl.If(plan["proceed"] == "true", name="something new"):
                dataset = step("preprocess")["dataset"]
                with dsl.If(plan["tune"] == "true", name="search"):
                    searched = step("tune", dataset=dataset)
                with dsl.Else(name="no search"):
                    given = step("tune-off", dataset=dataset)
                tuning = dsl.OneOf(searched["tuning"], given["tuning"])
                model = step("train", dataset=dataset, tuning=tuning)["model"]
                with dsl.If(plan["distill"] == "true", name="student"):
                    taught = step("distill", dataset=dataset, model=model)
                with dsl.Else(name="no student"):
                    same = step("distill-off", dataset=dataset, model=model)
                student = dsl.OneOf(taught["student"], same["student"])
                with dsl.If(plan["quantize"] == "true", name="int8"):
                    small = step("quantize", dataset=dataset, student=student)
                with dsl.Else(name="no int8"):
                    large = step("quantize-off", dataset=dataset, student=student)
                quantized = dsl.OneOf(small["quantized"], large["quantized"])
                judged = step(
                    "evaluate", dataset=dataset, model=model, student=student, quantized=quantized, tuning=tuning
                )
                step("promote", dataset=dataset, quantized=quantized, evaluation=judged["evaluation"])

    return pipeline
