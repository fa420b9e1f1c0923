"""What is learned: each task gives batches, loss terms and metrics; the loop never asks which task it serves.

To add one, write `trainer/tasks/NAME.py` with a subclass of `Task` and enter it in `trainer.plugins.TASKS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import plugins
from trainer.tasks.base import Batch, Task, evaluating

if TYPE_CHECKING:
    from trainer.artifacts.dataset import Dataset
    from trainer.config import Params

__all__ = ["Batch", "Task", "build", "evaluating"]


def build(params: Params, dataset: Dataset) -> Task:
    """The task that `params.task.name` names, on a dataset.

    Raises:
        ConfigError: the dataset was made for another task.
    """
    task: Task = plugins.load(plugins.TASKS[params.task.name])(params, dataset)
    return task
