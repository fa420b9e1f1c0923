"""How each task's pod is set up: resources, rights, volumes, secrets, caching and retries of lost pods.

The pods of jobs that a task launches are not set up here but by components/launch.
"""

from __future__ import annotations

from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components.table import Task, resources
from trainer.config import Params

_BACKOFF_MAX_S = 3600


def place(task: PipelineTask, row: Task, params: Params, gpus: Any = None) -> PipelineTask:
    """Set up a task as its row of the table and params.yaml's `cluster` say.

    Args:
        task: the task in the pipeline.
        row: its row of the table.
        params: the configuration that is compiled in.
        gpus: pipeline input with the number of accelerators, for a row that is accelerated.
    """
    cluster = params.cluster
    asked = resources(row, params)
    task.set_display_name(row.name)
    task.set_caching_options(row.cached)
    task.set_cpu_request(asked.cpu).set_memory_request(asked.memory).set_memory_limit(asked.memory)
    if row.accelerated and gpus is not None:
        task.set_accelerator_type(cluster.accelerator).set_accelerator_limit(gpus)
    if cluster.retries:
        # For pods that are lost. A command that fails is repeated by the entry point, if that can help: KFP's default
        # manifests never repeat it, and others would repeat a wrong parameter too.
        seconds = f"{max(1, round(cluster.backoff_s))}s"
        task.set_retry(cluster.retries, seconds, 2.0, f"{_BACKOFF_MAX_S}s")
    if cluster.security_context:
        kubernetes.set_security_context(task, run_as_user=cluster.user, run_as_group=cluster.user, run_as_non_root=True)
    # HOME and caches: the image's own file system may be read-only.
    kubernetes.empty_dir_mount(task, "tmp", "/tmp")  # noqa: S108
    if row.image == "trainer":
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=cluster.shm)  # noqa: S108
    if cluster.claim:
        kubernetes.mount_pvc(task, cluster.claim, cluster.mount)
    for name, place in cluster.secrets.items():
        secret, _, key = place.partition("/")
        kubernetes.use_secret_as_env(task, secret, {key: name})
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.pull_secrets))
    return task
