"""Section `cluster`: what the pipeline's containers are given. Read when the pipeline is compiled, by no stage."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from trainer.config.base import Section
from trainer.config.job import EnvName, Job

SecretKey = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/[A-Za-z0-9._-]{1,253}$")]
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


def _absolute(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/") or path.rstrip("/") in ("", "/tmp", "/dev/shm"):  # noqa: S108
        raise ValueError(f"must be an absolute path with no `..`, and neither / nor /tmp (given {path!r})")
    return path.rstrip("/")


class Resources(Section):
    """What a stage's container asks for; a memory request is its limit as well."""

    cpu: str = Field(default="", pattern=rf"{_QUANTITY}|^$")
    """Processors, such as 2 or 500m; empty leaves the stage's own default."""
    memory: str = Field(default="", pattern=rf"{_QUANTITY}|^$")
    """Memory, such as 8Gi; empty leaves the stage's own default."""


class Cluster(Section):
    """Containers: their images, rights, volumes, secrets and retries. Read when the pipeline is compiled."""

    image_prefix: str = Field(default="docker.io/millrace", pattern=r"^[a-z0-9][a-z0-9._:/-]*[a-z0-9]$")
    """Registry and folder of the images `data`, `trainer` and `launcher`."""
    image_tag: str = Field(default="", pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$")
    """Tag of the images; empty takes this version of millrace."""
    pull_secrets: tuple[str, ...] = ()
    """Names of Kubernetes secrets with which the images are pulled."""
    user: int = Field(default=65532, ge=1)
    """User and group that the containers run as; never root."""
    security_context: bool = True
    """Set the user on each task, as the Kubernetes policy restricted demands. Kubeflow 2.15 knows no such setting and refuses
    the pipeline: with false, its containers run as the images' own user, 65532."""
    retries: int = Field(default=2, ge=0, le=10)
    """How often a stage that a signal killed (exit codes from 128), or whose pod was lost, is tried again."""
    backoff_s: float = Field(default=10.0, ge=0.0, le=3600.0)
    """Seconds before the first retry; twice as long before each further one."""
    secrets: dict[EnvName, SecretKey] = Field(default={})
    """Environment variable -> Kubernetes secret and key that hold its value, such as secret-name/key."""
    claim: str = Field(default="", pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")
    """PersistentVolumeClaim that every stage mounts, for data, artifacts by reference and the registry."""
    mount: Annotated[str, AfterValidator(_absolute)] = "/mnt/millrace"
    """Where the claim is mounted."""
    store: str = ""
    """URI, such as s3://bucket/runs, or mounted path where stages put what they make; Kubeflow then passes references of a
    few bytes. Empty passes everything through its own store. Default of the pipeline input store."""
    gpus_per_node: int = Field(default=0, ge=0)
    """Accelerators of each pod that trains; default of the pipeline input gpus_per_node."""
    shm: str = Field(default="1Gi", pattern=_QUANTITY)
    """Size of /dev/shm in containers that train."""
    accelerator: str = Field(default="nvidia.com/gpu", min_length=1)
    """Resource name of an accelerator, for pipeline input gpus_per_node."""
    resources: dict[str, Resources] = Field(default={})
    """Stage -> what its container asks for, where that is not the stage's own default."""
    job: Job = Field(default=Job(), description=Job.__doc__)
