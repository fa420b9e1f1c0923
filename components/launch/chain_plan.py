"""The stages of a run as jobs: what each reads and writes, and whether all pods can reach it.

Artifacts pass from pod to pod by URI: STORE/RUN/ARTIFACT, or MOUNT/runs/RUN/ARTIFACT on the claim that all pods mount.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from components.launch.spec import PARAMS_ENV
from trainer import storage
from trainer.config import Params
from trainer.config.load import with_values
from trainer.configure import places, refuse_secrets
from trainer.errors import ConfigError
from trainer.stage import STAGES

# The first job, as in the pipeline for Kubeflow: it checks the store and the data before anything large is pulled.
CONFIGURE = "configure"
BUILTIN, DVC = "builtin:", "dvc:"


@dataclass(frozen=True)
class Step:
    """A stage of a run.

    Attributes:
        stage: its name.
        args: words after `python -m trainer`.
        inputs: name -> URI.
        outputs: name -> URI.
    """

    stage: str
    args: tuple[str, ...]
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


def settled(params: Params) -> Params:
    """The configuration of a run: checked for what no pod could reach, and with a registry that outlives the pods.

    Raises:
        ConfigError: there is no place for artifacts, or a path is one of this machine; the message names the key.
    """
    base = store(params)
    refuse_secrets({**places(params), "cluster.store": base})
    if not storage.is_remote(base) and not _mounted(base, params):
        raise ConfigError(
            f"cluster.store: {base}: a folder of one pod, the next one does not see it",
            f"set it to a URI such as s3://bucket/runs, or to a path below cluster.mount ({params.cluster.mount}) and name "
            "a PersistentVolumeClaim in cluster.claim",
        )
    for key, uri in _sources(params):
        if not uri.startswith((BUILTIN, DVC)) and not storage.is_remote(uri) and not _mounted(uri, params):
            raise ConfigError(
                f"{key}: {uri}: a file of this machine, which pods do not see",
                f"upload it and name its URI (s3://..., gs://..., abfs://...), or copy it to the claim and name its path there, "
                f"below {params.cluster.mount}",
            )
    registry = params.promote.registry
    if storage.is_remote(registry) or _mounted(registry, params):
        return params
    if storage.local_path(registry).is_absolute():
        raise ConfigError(
            f"promote.registry: {registry}: a folder of one pod, gone with it",
            f"set it to a URI, to a path below cluster.mount ({params.cluster.mount}), or to `registry`, which is kept "
            "beside the runs",
        )
    place = f"{params.cluster.store.rstrip('/') or params.cluster.mount}/{PurePosixPath(registry)}"
    return with_values(params, {"promote.registry": place})


def store(params: Params) -> str:
    """The place below which each run has a folder.

    Raises:
        ConfigError: params.yaml names none.
    """
    if params.cluster.store:
        return params.cluster.store.rstrip("/")
    if params.cluster.claim:
        return f"{params.cluster.mount}/runs"
    raise ConfigError(
        "cluster.store, cluster.claim: neither is set, so what one pod makes, the next one could not read",
        "set cluster.store to a URI such as s3://bucket/runs, or cluster.claim to a PersistentVolumeClaim that all pods mount",
    )


def root(params: Params, run: str) -> str:
    """Where the artifacts of a run are."""
    return f"{store(params)}/{run}"


def steps(params: Params, root: str) -> list[Step]:
    """All stages in their order, each reading what those before it made below `root`."""
    return [_step(name, root, params) for name in STAGES]


def _step(name: str, root: str, params: Params) -> Step:
    stage = STAGES[name]
    inputs = {port: f"{root}/{port}" for port in stage.inputs}
    outputs = {port: f"{root}/{port}" for port in stage.outputs}
    words = [name, "--params", f"env:{PARAMS_ENV}"]
    for flag, ports in (("--in", inputs), ("--out", outputs)):
        for port, uri in ports.items():
            words += [flag, f"{port}={uri}"]
    if name == "promote":
        words.append("--allow-refusal")  # a no is an answer, not a failure
    return Step(name, tuple(words), inputs, outputs)


def gpus(params: Params, stage: str) -> int:
    """Accelerators of each pod of a stage: none for one that is switched off. Search in one pod and distillation see one;
    the trials of an Experiment train as `train` does.
    """
    asked = params.cluster.gpus_per_node
    if stage == "train" or (stage == "tune" and params.tune.enabled and "tune" in params.cluster.job.launched):
        return asked
    switched = {"tune": params.tune.enabled, "distill": params.distill.enabled}
    return min(asked, 1) if switched.get(stage) else 0


def _sources(params: Params) -> Iterator[tuple[str, str]]:
    yield "data.source", params.data.source
    if params.data.tokenizer.path:
        yield "data.tokenizer.path", params.data.tokenizer.path
    if params.distill.enabled:
        yield from (("distill.teachers", uri) for uri in params.distill.teachers)


def _mounted(uri: str, params: Params) -> bool:
    """Whether a path lies on the claim that all pods mount."""
    path = PurePosixPath(uri.removeprefix("file://"))
    return bool(params.cluster.claim) and ".." not in path.parts and path.is_relative_to(params.cluster.mount)
