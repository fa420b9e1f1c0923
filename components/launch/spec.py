"""What a job on a cluster is, whichever kind of object asks for it: made from params.yaml, rendered by the modules beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer import storage
from trainer.config import Params
from trainer.errors import ConfigError
from trainer.parallel import fits
from trainer.stage import STAGES

COMMAND = ("python", "-m", "trainer")
# The configuration reaches the pods in this variable: `--params env:MILLRACE_PARAMS`.
PARAMS_ENV = "MILLRACE_PARAMS"


@dataclass(frozen=True)
class JobSpec:
    """A job, neutral.

    Attributes:
        name: of the object; see names.py.
        stage: the stage that it runs, for labels.
        namespace: where it runs; empty leaves it to the API client.
        image: of its container.
        command: program of the container, as words.
        args: its arguments.
        nodes: pods that work together.
        processes: processes of each pod.
        gpus: accelerators of each pod; 0 asks for none.
        accelerator: resource name of an accelerator.
        devices: further resources of each pod: name -> count.
        env: environment variables.
        secret_env: environment variable -> `secret/key` that holds its value.
        cpu: processors that each pod requests, as a Kubernetes quantity; empty requests none.
        memory: memory of each pod, request and limit; empty has neither.
        shm: size of /dev/shm; empty leaves the runtime's, 64 MiB.
        claim: PersistentVolumeClaim that is mounted, if any.
        mount: where it is mounted.
        user: user and group of the processes; 0 leaves it to the image.
        pull_secrets: names of secrets with which the image is pulled.
        service_account: of the pods; empty takes the namespace's default.
        scheduler: default, kueue or volcano.
        queue: of Kueue or Volcano.
        priority_class: PriorityClass of the pods.
        node_selector: labels that a node must have.
        tolerations: taints that the pods put up with, as Kubernetes writes them.
        labels: further labels of the pods.
        annotations: further annotations of the pods.
        queue_timeout_s: seconds until all its pods must run.
        run_timeout_s: seconds that it may run; 0 has no limit.
        restarts: pods that may be put in place again.
        grace_s: seconds between SIGTERM and SIGKILL.
        ttl_s: seconds that it is kept when it has ended; None for ever.
        master: a PyTorchJob of a Master and Workers.
        run: the run that it belongs to, if known.
        owner: the ownerReference of what it goes away with, if any.
    """

    name: str
    stage: str
    image: str
    args: tuple[str, ...]
    namespace: str = ""
    command: tuple[str, ...] = COMMAND
    nodes: int = 1
    processes: int = 1
    gpus: int = 0
    accelerator: str = "nvidia.com/gpu"
    devices: Mapping[str, int] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict)
    cpu: str = ""
    memory: str = ""
    shm: str = "1Gi"
    claim: str = ""
    mount: str = "/mnt/millrace"
    user: int = 65532
    pull_secrets: tuple[str, ...] = ()
    service_account: str = ""
    scheduler: str = "default"
    queue: str = ""
    priority_class: str = ""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    queue_timeout_s: float = 3600.0
    run_timeout_s: float = 0.0
    restarts: int = 10
    grace_s: int = 30
    ttl_s: int | None = 86400
    master: bool = False
    run: str = ""
    owner: Mapping[str, Any] | None = None

    @property
    def deadline_s(self) -> int | None:
        """Seconds after which the cluster itself ends the job, should nobody watch it; None without a run timeout."""
        return round(self.queue_timeout_s + self.run_timeout_s) if self.run_timeout_s else None


def training(
    params: Params,
    *,
    name: str,
    namespace: str = "",
    args: Sequence[str],
    gpus: int | None = None,
    nodes: int | None = None,
    owner: Mapping[str, Any] | None = None,
    run: str = "",
) -> JobSpec:
    """The job that trains: params.yaml's cluster.job on every pod.

    Args:
        params: the configuration.
        name: of the object.
        namespace: where it runs.
        args: words after `python -m trainer`.
        gpus: accelerators of each pod; None takes cluster.gpus_per_node.
        nodes: pods; None takes cluster.job.nodes.
        owner: ownerReference of what it goes away with.
        run: the run that it belongs to.
    """
    job = params.cluster.job
    return stage(
        params, "train", name=name, namespace=namespace, args=args, gpus=gpus, nodes=nodes or job.nodes, owner=owner, run=run
    )  # fmt: skip


def stage(
    params: Params,
    task_name: str,
    *,
    name: str,
    namespace: str = "",
    args: Sequence[str],
    gpus: int | None = None,
    nodes: int = 1,
    owner: Mapping[str, Any] | None = None,
    run: str = "",
) -> JobSpec:
    """The job of one stage. Where it may run (queue, node labels, taints, devices) is for stages with accelerators alone;
    labels, annotations and the service account, by which a pod may reach an object store, are for all.

    Args:
        params: the configuration.
        task_name: a row of components/table.py.
        name: of the object.
        namespace: where it runs.
        args: words after `python -m trainer`.
        gpus: accelerators of each pod; None takes cluster.gpus_per_node, for a stage that uses any.
        nodes: pods.
        owner: ownerReference of what it goes away with.
        run: the run that it belongs to.

    Raises:
        ConfigError: two keys ask for the same device, or the model cannot be divided among so many ranks.
    """
    from components.table import TASKS, image, resources

    task, cluster, job = TASKS[task_name], params.cluster, params.cluster.job
    asked = resources(task, params)
    spec = JobSpec(
        name=name,
        stage=task_name,
        namespace=namespace,
        image=image(task, params),
        args=tuple(args),
        nodes=nodes,
        env={**job.env, PARAMS_ENV: sections(params, task_name)},
        secret_env=cluster.secrets,
        cpu=asked.cpu,
        memory=asked.memory,
        shm=cluster.shm if task.image == "trainer" else "",
        claim=cluster.claim,
        mount=cluster.mount,
        user=cluster.user,
        pull_secrets=cluster.pull_secrets,
        service_account=job.service_account,
        priority_class=job.priority_class,
        labels=job.labels,
        annotations=job.annotations,
        queue_timeout_s=job.queue_timeout_s,
        run_timeout_s=job.run_timeout_s,
        restarts=cluster.retries,
        grace_s=job.grace_s,
        ttl_s=job.ttl_s,
        run=run,
        owner=owner,
    )
    if not task.accelerated:
        return spec
    if task_name == "train":
        fits.check_ahead(params, params.train.processes * nodes)
    if cluster.accelerator in job.devices:
        message = f"cluster.job.devices: {cluster.accelerator} is what cluster.gpus_per_node counts"
        raise ConfigError(message, "name it in one place: cluster.gpus_per_node")
    return replace(
        spec,
        processes=params.train.processes,
        gpus=cluster.gpus_per_node if gpus is None else gpus,
        accelerator=cluster.accelerator,
        devices=job.devices,
        scheduler=job.scheduler,
        queue=job.queue,
        node_selector=job.node_selector,
        tolerations=tuple(_toleration(each.model_dump()) for each in job.tolerations),
        restarts=job.restarts,
        master=job.master and task_name == "train",
    )


def _toleration(row: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if value}


def sections(params: Params, task_name: str) -> str:
    """The sections of params.yaml that a stage reads, as JSON text for its environment."""
    row = STAGES.get(task_name)
    names = set(row.sections) if row else set(type(params).model_fields)
    if task_name == "tune":
        names.add("parallel")  # a trial trains, on several nodes perhaps
    tree = {name: getattr(params, name).model_dump(mode="json") for name in names}
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def check_processes(spec: JobSpec) -> None:
    """Refuse more processes than accelerators: NCCL gives none of them to two.

    Raises:
        ConfigError: there are more.
    """
    if spec.gpus and spec.processes > spec.gpus:
        message = f"train.processes: {spec.processes} processes of a pod cannot share its {spec.gpus} accelerators"
        raise ConfigError(message, f"set train.processes={spec.gpus}, or cluster.gpus_per_node={spec.processes}")


def digest(obj: Mapping[str, Any]) -> str:
    """What tells two rendered objects apart: 16 hex digits over kind and spec; names, labels and owners do not count."""
    told = {key: value for key, value in obj.items() if key not in ("metadata", "status")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def checkpoints(params: Params, name: str, output: str, nodes: int) -> list[str]:
    """The option of `python -m trainer train` that says where checkpoints are, which all pods of a job must see.

    Beside an output on the claim they are anyway; of one in an object store they go to the claim.

    Args:
        params: the configuration.
        name: of the job.
        output: URI of what it makes.
        nodes: its pods.

    Raises:
        ConfigError: several nodes, and no volume that they share.
    """
    cluster = params.cluster
    if not storage.is_remote(output):
        return []
    if cluster.claim:
        return ["--scratch", f"{cluster.mount}/scratch/{name}"]
    if nodes > 1:
        raise ConfigError(
            f"cluster.claim: not set, and the checkpoints of {nodes} nodes need a volume that all of them mount",
            "name a PersistentVolumeClaim of access mode ReadWriteMany, or set cluster.job.nodes=1",
        )
    return []
