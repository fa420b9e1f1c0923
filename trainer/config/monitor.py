"""Section `monitor`: where a run's figures go besides history.jsonl."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.base import Section


class Monitor(Section):
    """Where a run's figures go besides history.jsonl, which is always written."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers that get each logged row: tensorboard (needs nothing), wandb and mlflow (each needs its package)."""
    project: str = Field(default="millrace", min_length=1)
    """Project (W&B) or experiment (MLflow)."""
    folder: str = "out/tracking"
    """Folder of TensorBoard's files, and of MLflow's where MLFLOW_TRACKING_URI names no server."""
