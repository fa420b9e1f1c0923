"""Trackers that `monitor.trackers` names: TensorBoard's files, W&B and MLflow. They get each row, in a thread of their own.

A missing package is an error at the start. What fails later (a server, a login, a full disk) is said once and ends no run.
"""

from __future__ import annotations

import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer import log, storage
from trainer.config import Monitor, Params
from trainer.errors import ConfigError, redact
from trainer.monitor.sinks import Background, Figures, Guarded, Sink
from trainer.record import without_secrets

# Tracker -> its module and what to install.
PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
# Keeps the identity of a run beside its checkpoints, so that the same run goes on in the trackers too.
_IDENTITY = "tracked-run"
_SECTIONS = ("task", "model", "train", "parallel")


def check(monitor: Monitor) -> None:
    """Refuse trackers whose packages are not there.

    Raises:
        ConfigError: with what to install.
    """
    for name in monitor.trackers:
        module, package = PACKAGES.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"monitor.trackers: {name}, but the package {package} is not installed",
                f"pip install {package}, or leave {name} out",
            )


def open_trackers(params: Params, what: str, scratch: Path | None) -> list[Sink]:
    """The trackers of a run, behind one sink that does not wait and does not fail; none if none is asked for.

    Args:
        params: `monitor` says which; the sections that fix a run are passed on to W&B and MLflow.
        what: name of the run's kind, such as train.
        scratch: the run's folder of checkpoints, which keeps its identity over a kill.

    Raises:
        ConfigError: a package is missing.
    """
    monitor = params.monitor
    check(monitor)
    if not monitor.trackers:
        return []
    identity = _identity(scratch)
    tree = params.model_dump(mode="json")
    config = {section: without_secrets(tree[section]) for section in _SECTIONS}
    sinks: dict[str, Sink] = {}
    for name in monitor.trackers:
        try:
            sinks[name] = _OPEN[name](monitor, f"{what}-{identity}", identity, config)
        except Exception as error:  # whatever a library raises: no run waits for a server that is down
            said = (str(error).splitlines() or [""])[0]
            log.say(f"{name} takes no figures: {redact(f'{type(error).__name__}: {said}')}; the run goes on")
    return [Background(Guarded(sinks))] if sinks else []


def _identity(scratch: Path | None) -> str:
    """Twelve hexadecimal digits, the same for a run that goes on."""
    fresh = uuid.uuid4().hex[:12]
    if scratch is None:
        return fresh
    path = scratch / _IDENTITY
    if path.is_file():
        return path.read_text(encoding="ascii").strip() or fresh
    scratch.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, fresh.encode())
    return fresh


def _open_tensorboard(monitor: Monitor, name: str, identity: str, config: Mapping[str, Any]) -> Sink:
    from trainer.monitor.tensorboard import TensorBoard

    folder = Path(monitor.folder) / name
    log.say(f"figures go to {folder}: tensorboard --logdir {monitor.folder}")
    return TensorBoard(folder)


class Wandb:
    """Weights & Biases; offline where WANDB_MODE says so."""

    def __init__(self, monitor: Monitor, name: str, identity: str, config: Mapping[str, Any]) -> None:
        import wandb

        folder = Path(monitor.folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing of the machine: its log, its code and its command line stay here.
        settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True, x_disable_meta=True)
        self._run = wandb.init(
            project=monitor.project, name=name, id=identity, dir=str(folder), config=dict(config), settings=settings,
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
        )  # fmt: skip

    def resume(self, step: int, evaluated: int) -> None:
        """Nothing: rows that it has already are not sent again."""

    def row(self, step: int, figures: Figures) -> None:
        """Send a row, if it has not got this far."""
        if step >= self._run.step:
            self._run.log(dict(figures), step=step)

    def close(self, ok: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=0 if ok else 1)


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, or a folder."""

    def __init__(self, monitor: Monitor, name: str, identity: str, config: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # Recent versions want to be asked twice for plain files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (Path(monitor.folder) / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(monitor.project)
        experiment = found.experiment_id if found else self._client.create_experiment(monitor.project)
        runs = self._client.search_runs([experiment], f"tags.`millrace.run` = '{identity}'", max_results=1)
        self._seen: dict[str, int] = {}
        self._again = bool(runs)
        if runs:
            self._id = runs[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
        else:
            self._id = self._client.create_run(experiment, tags={"millrace.run": identity}, run_name=name).info.run_id
            for key, value in _flat(config):
                self._client.log_param(self._id, key, str(value)[:500])

    def resume(self, step: int, evaluated: int) -> None:
        """Nothing: figures that it has already are not sent again."""

    def row(self, step: int, figures: Figures) -> None:
        """Send the figures that it has not got."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [Metric(name, value, now, step) for name, value in figures.items() if step > self._last(name)]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def _last(self, name: str) -> int:
        """The last step of a figure that an earlier attempt of the run has sent."""
        if name not in self._seen:
            history = self._client.get_metric_history(self._id, name) if self._again else []
            self._seen[name] = max((metric.step for metric in history), default=-1)
        return self._seen[name]

    def close(self, ok: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, "FINISHED" if ok else "FAILED")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


_OPEN: dict[str, Callable[[Monitor, str, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": _open_tensorboard,
    "wandb": Wandb,
    "mlflow": MLflow,
}
