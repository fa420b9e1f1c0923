"""Configuration: one closed schema for params.yaml, the CLI, DVC, Katib and the KFP run form. Imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from trainer.config.base import Section
from trainer.config.cluster import Cluster
from trainer.config.data import Data, Task
from trainer.config.model import FAMILIES, Model, NgramBag
from trainer.config.monitor import Monitor
from trainer.config.parallel import Parallel
from trainer.config.stages import Distill, Evaluate, Promote, Quantize, Tune
from trainer.config.train import Train

__all__ = [
    "Cluster", "Data", "Distill", "Evaluate", "Model", "Monitor", "Parallel", "Params", "Promote", "Quantize", "Section", "Task",
    "Train", "Tune",
]  # fmt: skip


class Params(Section):
    """The whole of params.yaml: one section per concern, each with defaults."""

    data: Data = Field(default=Data(), description=Data.__doc__)
    task: Task = Field(default=Task(), description=Task.__doc__)
    model: Model = Field(default=NgramBag(), description="The model: `name` chooses the family.")
    train: Train = Field(default=Train(), description=Train.__doc__)
    parallel: Parallel = Field(default=Parallel(), description=Parallel.__doc__)
    tune: Tune = Field(default=Tune(), description=Tune.__doc__)
    distill: Distill = Field(default=Distill(), description=Distill.__doc__)
    quantize: Quantize = Field(default=Quantize(), description=Quantize.__doc__)
    evaluate: Evaluate = Field(default=Evaluate(), description=Evaluate.__doc__)
    promote: Promote = Field(default=Promote(), description=Promote.__doc__)
    monitor: Monitor = Field(default=Monitor(), description=Monitor.__doc__)
    cluster: Cluster = Field(default=Cluster(), description=Cluster.__doc__)

    @model_validator(mode="after")
    def _family_learns_task(self) -> Self:
        for key, model in (("model", self.model), ("distill.student", self.distill.student)):
            if key == "distill.student" and not self.distill.enabled:
                continue
            tasks = FAMILIES[model.name][2]
            if self.task.name not in tasks:
                fitting = [name for name, (_, _, learns) in FAMILIES.items() if self.task.name in learns]
                raise ValueError(
                    f"{key}.name is {model.name!r}, which cannot learn task {self.task.name!r}; use one of {', '.join(fitting)}"
                )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_divided(self) -> Self:
        ranks, length = self.parallel.cp, self.data.max_length
        if ranks == 1:
            return self
        if self.task.name != "lm":
            raise ValueError(
                f"parallel.cp ({ranks}) divides the sequences of language models, and task.name is {self.task.name!r}: use "
                "parallel.cp: 1"
            )
        if length % (2 * ranks):
            step = 2 * ranks
            fitting = " or ".join(str(each) for each in (length // step * step, -(-length // step) * step) if each)
            raise ValueError(
                f"parallel.cp ({ranks}) cuts each sequence into {step} slices, and data.max_length is {length}: use {fitting} "
                "for that, or parallel.cp: 1"
            )
        return self

    @model_validator(mode="after")
    def _classes_to_weigh(self) -> Self:
        if self.task.name == "lm" and self.train.class_weights != "none":
            raise ValueError(
                f"train.class_weights is {self.train.class_weights!r}, but a language model has no classes to weigh; use none"
            )
        return self
