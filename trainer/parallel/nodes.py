"""This pod's place among the pods that train together, from the variables that the training operators set.

PyTorchJob (worker-only, elastic) sets PET_NNODES and PET_RDZV_ENDPOINT, and the pod's template adds MILLRACE_NODE_RANK from
its label; PyTorchJob with a Master and TrainJob set PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT
(kubeflow/trainer release-1.9 pkg/controller.v1/pytorch/{envvar,elastic}.go; v2 pkg/runtime/framework/plugins/torch).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import ConfigError

RANK, NODES = "MILLRACE_NODE_RANK", "MILLRACE_NODES"
# Set by the rendezvous for the ranks: how often the nodes have met.
GENERATION = "MILLRACE_GENERATION"
DEFAULT_PORT = 23456


@dataclass(frozen=True)
class Node:
    """One of the pods that train together.

    Attributes:
        rank: 0 for the one where the others meet.
        count: pods in all; 1 where nothing else is known.
        host: name of the first pod's host, empty for a single pod.
        port: port at which the pods meet.
    """

    rank: int = 0
    count: int = 1
    host: str = ""
    port: int = DEFAULT_PORT


def here(environment: Mapping[str, str] = os.environ) -> Node:
    """This pod, or a machine of its own.

    Raises:
        ConfigError: the variables contradict each other.
    """
    count = environment.get("PET_NNODES", "1").rpartition(":")[2]
    if count == "1":
        return Node()
    rank = environment.get(RANK) or environment.get("PET_NODE_RANK") or ""
    endpoint = environment.get("PET_RDZV_ENDPOINT") or ":".join(
        environment.get(name, "") for name in ("PET_MASTER_ADDR", "PET_MASTER_PORT")
    )
    host, _, port = endpoint.rpartition(":")
    if not (count.isdigit() and rank.isdigit() and host and (port or "0").isdigit() and int(rank) < int(count)):
        raise ConfigError(
            f"PET_NNODES={count}, node rank {rank or 'unknown'}, rendezvous {endpoint!r}: not a pod of a training job",
            f"start the job with `millrace render` or the launcher; or set {RANK} and PET_RDZV_ENDPOINT=HOST:PORT",
        )
    return Node(int(rank), int(count), host, int(port or DEFAULT_PORT))
