"""`millrace doctor --cluster`: has the cluster nodes on which the pods of params.yaml fit?"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import Any

from components.launch.api import Object
from components.launch.spec import JobSpec
from pipelines.doctor_look import Look, asked, number

# The kubelet may be this many minor versions behind the API server, and none ahead.
_SKEW = 3
# podFailurePolicy of Jobs, by which a permanent error ends one at once, is on from here.
_OLDEST = (1, 26)


def minor(version: str) -> tuple[int, int]:
    """(1, 33) of v1.33.4+k3s1."""
    parts = version.lstrip("v").split(".")
    try:
        return int(parts[0]), int(_digits(parts[1]))
    except (IndexError, ValueError):
        return 0, 0


def _digits(text: str) -> str:
    return text[: len(text) - len(text.lstrip("0123456789"))]


def versions(look: Look, server: str, nodes: list[Object]) -> None:
    """Is the server new enough, and do the kubelets go with it?"""
    have = minor(server)
    if (0, 0) < have < _OLDEST:
        look.finding(
            f"Kubernetes {server} is older than {_OLDEST[0]}.{_OLDEST[1]}",
            "Jobs with a podFailurePolicy are refused or misunderstood, and a permanent error would be tried again",
            "upgrade the cluster",
        )
    apart: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        kubelet = str(((node.get("status") or {}).get("nodeInfo") or {}).get("kubeletVersion", ""))
        found = minor(kubelet)
        if found > (0, 0) < have and not 0 <= have[1] - found[1] <= _SKEW:
            apart[kubelet].append(node["metadata"]["name"])
    for kubelet, names in apart.items():
        look.finding(
            f"kubelet {kubelet} of {', '.join(names)} does not go with API server {server}",
            f"a kubelet may be at most {_SKEW} minor versions older and none newer: pods there may misbehave",
            f"upgrade the nodes, or keep pods away from them: kubectl cordon {' '.join(names)}",
        )


def room(look: Look, nodes: list[Object]) -> None:
    """Do the pods of the job fit on the nodes that it may use, if nothing else ran there?"""
    spec = look.job()
    needs = asked(spec)
    look.facts["nodes"] = {
        node["metadata"]["name"]: {name: str(_allocatable(node)[name]) for name in sorted(_allocatable(node))
                                   if name in ("cpu", "memory") or "/" in name}
        for node in nodes
    }  # fmt: skip
    usable = [node for node in nodes if not _shut(node, spec)]
    if not usable:
        selector = ", ".join(f"{key}={value}" for key, value in spec.node_selector.items())
        look.finding(
            f"none of the {len(nodes)} nodes takes the pods of params.yaml"
            + (f": cluster.job.node_selector asks for {selector}" if selector else ""),
            "; ".join(sorted({_shut(node, spec) for node in nodes})) or "the cluster has no nodes",
            "kubectl get nodes --show-labels; set cluster.job.node_selector and cluster.job.tolerations, or add nodes; "
            "fine as it is if an autoscaler adds them",
        )
        return
    for name, amount in sorted(needs.items()):
        most = max(number(_allocatable(node).get(name, "0")) for node in usable)
        if amount > most:
            look.finding(
                f"a pod asks for {name} of {_amount(amount)}, and no node has more than {_amount(most)} of it",
                "it can be scheduled nowhere, and the job waits until cluster.job.queue_timeout_s",
                _smaller(name, spec),
            )
    fitting = sum(_pods(node, needs) for node in usable)
    if 0 < fitting < spec.nodes:
        look.finding(
            f"the job is {spec.nodes} pods (cluster.job.nodes), and {fitting} of them fit on the cluster's nodes",
            "training begins only when all run",
            f"set cluster.job.nodes: {fitting} in params.yaml, ask for less in each pod, or add nodes; "
            "fine as it is if an autoscaler adds them",
        )


def _allocatable(node: Object) -> dict[str, Any]:
    return (node.get("status") or {}).get("allocatable") or {}


def _pods(node: Object, needs: dict[str, Fraction]) -> int:
    there = _allocatable(node)
    counts = [int(number(there.get(name, "0")) // amount) for name, amount in needs.items() if amount]
    return min([*counts, int(number(there.get("pods", "110")))])


def _shut(node: Object, spec: JobSpec) -> str:
    """Why the pods cannot run on this node; empty if they can."""
    name = node["metadata"]["name"]
    given = node["metadata"].get("labels") or {}
    if any(given.get(key) != value for key, value in spec.node_selector.items()):
        return f"{name} has other labels"
    conditions = (node.get("status") or {}).get("conditions") or []
    if not any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions):
        return f"{name} is not ready"
    for taint in (node.get("spec") or {}).get("taints") or []:
        if taint.get("effect") != "PreferNoSchedule" and not any(_bears(each, taint) for each in spec.tolerations):
            return f"{name} has the taint {taint.get('key')}:{taint.get('effect')}"
    return ""


def _bears(toleration: Any, taint: Any) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if not toleration.get("key"):
        return True
    same = toleration["key"] == taint.get("key")
    exists = toleration.get("operator", "Equal") == "Exists"
    return bool(same and (exists or toleration.get("value", "") == taint.get("value", "")))


def _smaller(name: str, spec: JobSpec) -> str:
    see = "kubectl get nodes -o json | grep -A9 allocatable shows what there is"
    if name in ("cpu", "memory"):
        return f"set cluster.resources.train.{name} in params.yaml to less, or add larger nodes ({see})"
    setting = "cluster.gpus_per_node" if name == spec.accelerator else f"cluster.job.devices.{name}"
    return f"set {setting} in params.yaml to less, add such nodes, or install the device plugin of {name} ({see})"


def _amount(value: Fraction) -> str:
    if value >= 1 << 20:
        return f"{float(value) / (1 << 30):.1f}Gi"
    return f"{float(value):g}"
