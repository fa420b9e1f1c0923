"""Section `cluster.job`: how training and search become jobs of a cluster. Read by what starts them, by no stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Section

EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]
LabelKey = Annotated[
    str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]


class Toleration(Section):
    """A taint that the pods of the job put up with."""

    key: str
    """Key of the taint; "" with operator Exists tolerates all."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists takes any value of the key, Equal only `value`."""
    value: str = ""
    """Value of the taint, for operator Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint; empty takes all."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError("value belongs to operator Equal: Exists takes any")
        if self.operator == "Equal" and not self.key:
            raise ValueError("key must be given for operator Equal")
        return self


class Job(Section):
    """Training and search as jobs of their own, beside the pod of their step: what starts them, where and for how long."""

    train: Literal["pod", "pytorchjob", "trainjob"] = "pod"
    """What trains: the step's own pod, a PyTorchJob (kubeflow.org/v1) or a TrainJob (trainer.kubeflow.org/v1alpha1)."""
    tune: Literal["pod", "experiment"] = "pod"
    """What searches: the step's own pod with Optuna, or a Katib Experiment (kubeflow.org/v1beta1)."""
    nodes: int = Field(default=1, ge=1, le=1024)
    """Pods that train together, each with train.processes processes; default of the pipeline input nodes."""
    master: bool = False
    """A PyTorchJob of a Master and Workers in place of Workers alone. The operator then gives the workers an init container
    that the Kubernetes policy restricted refuses."""
    devices: dict[LabelKey, Annotated[int, Field(ge=1)]] = Field(default={})
    """Further devices of each pod: resource name -> count, such as rdma/hca: 1 or vpc.amazonaws.com/efa: 4."""
    env: dict[EnvName, str] = Field(default={})
    """Environment variables of the job's pods, such as NCCL_DEBUG: INFO or NCCL_SOCKET_IFNAME: eth0. No secrets."""
    scheduler: Literal["default", "kueue", "volcano"] = "default"
    """Who admits the job: Kubernetes itself, Kueue (a label) or Volcano (a gang)."""
    queue: Name = ""
    """Queue of Kueue or Volcano."""
    priority_class: Name = ""
    """PriorityClass of the pods."""
    node_selector: dict[LabelKey, LabelValue] = Field(default={})
    """Labels that a node must have, such as node.kubernetes.io/instance-type: p4d.24xlarge."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that the pods put up with, such as key: nvidia.com/gpu."""
    labels: dict[LabelKey, LabelValue] = Field(default={})
    """Further labels of the pods, such as azure.workload.identity/use: "true"."""
    annotations: dict[LabelKey, str] = Field(default={})
    """Further annotations of the pods."""
    service_account: Name = ""
    """Service account of the pods that train, for a cloud's workload identity; they get no token of Kubernetes."""
    queue_timeout_s: float = Field(default=3600.0, ge=1.0)
    """Seconds that a job may wait until all its pods run; then it is removed, and the step fails and says why."""
    run_timeout_s: float = Field(default=0.0, ge=0.0)
    """Seconds that a job may run, recoveries included; 0 has no limit."""
    restarts: int = Field(default=10, ge=0, le=1000)
    """Pods of a job that may be lost or fail and are put in place again, before the job is given up."""
    grace_s: int = Field(default=30, ge=1, le=3600)
    """Seconds between SIGTERM and SIGKILL of a pod: the time for a last checkpoint."""
    ttl_s: int = Field(default=86400, ge=0)
    """Seconds that a finished job and its logs are kept."""
    parallel_trials: int = Field(default=2, ge=1, le=1000)
    """Trials of an Experiment at the same time."""
    failed_trials: int = Field(default=3, ge=0, le=1000)
    """Failed trials of an Experiment, after which it is given up."""
    goal: float | None = None
    """Value of tune.metric at which an Experiment ends early; null has none."""
    retain: bool = False
    """Keep the jobs and pods of finished trials, for their logs."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.scheduler != "default" and not self.queue:
            raise ValueError(f"queue must be named for scheduler {self.scheduler}")
        if self.queue and self.scheduler == "default":
            raise ValueError("scheduler must be kueue or volcano where a queue is named")
        if self.master and self.train == "trainjob":
            raise ValueError("master is a part of a PyTorchJob; a TrainJob has none")
        return self

    @property
    def training_nodes(self) -> int:
        """Pods that train together: one where the step's own pod trains."""
        return 1 if self.train == "pod" else self.nodes

    @property
    def launched(self) -> tuple[str, ...]:
        """Stages whose work is a job of the cluster, not that of the step's own pod."""
        return tuple(name for name, how in (("tune", self.tune), ("train", self.train)) if how != "pod")
