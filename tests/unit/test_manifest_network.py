"""The network policies of manifests/: who may reach whom, told by the rules of NetworkPolicy and not by a cluster, because
few test clusters enforce them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
OURS = {"kubernetes.io/metadata.name": "millrace"}
MANAGED = {"app.kubernetes.io/managed-by": "millrace"}


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or an address outside of the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, str] = field(default_factory=lambda: dict(OURS))
    address: str = ""


def pod(component: str, **labels: str) -> End:
    return End({**MANAGED, "app.kubernetes.io/component": component, **labels})


def elsewhere(namespace: str, **labels: str) -> End:
    return End(namespace={"kubernetes.io/metadata.name": namespace, **labels})


TRAINER = pod("train", **{"millrace.dev/job": "a"})
OTHER = pod("train", **{"millrace.dev/job": "b"})
TRIAL = pod("tune", **{"millrace.dev/job": "c", "katib.kubeflow.org/trial": "c-1"})
STAGE = pod("preprocess", **{"millrace.dev/job": "d"})
CHAIN = pod("chain", **{"millrace.dev/job": "e"})
SUGGESTION = End({"katib.kubeflow.org/deployment": "c-tpe", "katib.kubeflow.org/experiment": "c"})
KUBEFLOW, MONITORING, DNS = elsewhere("kubeflow"), elsewhere("monitoring"), elsewhere("kube-system")
MINIO = elsewhere("minio", **{"millrace.dev/object-store": "true"})
STRANGER = elsewhere("default")
INTERNET, METADATA, API = End(address="203.0.113.7"), End(address="169.254.169.254"), End(address="172.18.0.2")

# Name -> from, to, port, whether it is allowed; with which overlay.
CASES: dict[str, tuple[End, End, int, bool, str]] = {
    "rendezvous": (TRAINER, TRAINER, 23456, True, ""),
    "nccl": (TRAINER, TRAINER, 45123, True, ""),
    "trials of several pods": (TRIAL, TRIAL, 23456, True, ""),
    "no privileged port of a trainer": (TRAINER, TRAINER, 22, False, ""),
    "a stranger to the rendezvous": (STRANGER, TRAINER, 23456, False, ""),
    "a stage to the rendezvous": (STAGE, TRAINER, 23456, False, ""),
    "a trainer to a stranger": (TRAINER, STRANGER, 8080, False, ""),
    "scraped": (MONITORING, TRAINER, 9101, True, ""),
    "scraped elsewhere": (MONITORING, TRAINER, 23456, False, ""),
    "scraped by a stranger": (STRANGER, TRAINER, 9101, False, ""),
    "names": (TRAINER, DNS, 53, True, ""),
    "names of a suggestion": (SUGGESTION, DNS, 53, True, ""),
    "nothing else of kube-system": (TRAINER, DNS, 443, False, ""),
    "object store": (STAGE, INTERNET, 443, True, ""),
    "object store without TLS": (STAGE, INTERNET, 80, False, ""),
    "object store in the cluster": (TRAINER, MINIO, 9000, True, ""),
    "credentials of the node": (TRAINER, METADATA, 80, False, ""),
    "credentials of the node by TLS": (TRAINER, METADATA, 443, False, ""),
    "API server by a coordinator": (CHAIN, API, 6443, True, ""),
    "API server by a trainer": (TRAINER, API, 6443, False, ""),
    "search": (KUBEFLOW, SUGGESTION, 6789, True, ""),
    "search by a stranger": (STRANGER, SUGGESTION, 6789, False, ""),
    "metrics of a trial": (TRIAL, KUBEFLOW, 6789, True, ""),
    "early stopping": (TRIAL, SUGGESTION, 6788, True, ""),
    "a trainer is no trial": (TRAINER, KUBEFLOW, 6789, False, ""),
    "EKS Pod Identity": (TRAINER, End(address="169.254.170.23"), 80, True, "eks"),
    "EKS metadata": (TRAINER, METADATA, 80, False, "eks"),
    "GKE metadata server": (TRAINER, End(address="169.254.169.252"), 988, True, "gke"),
    "GKE Dataplane V2": (TRAINER, METADATA, 80, True, "gke"),
    "AKS metadata": (TRAINER, METADATA, 80, False, "aks"),
}


def policies(overlay: str) -> list[dict[str, Any]]:
    found = list(MANIFESTS.glob("components/networkpolicy/policies.yaml"))
    found += MANIFESTS.glob(f"overlays/{overlay}/identity.yaml") if overlay else []
    return [each["spec"] for path in found for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if not all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] in ("Exists", "In")
        if each["key"] not in labels or (each["operator"] == "In" and labels[each["key"]] not in each["values"]):
            return False
    return True


def is_peer(peer: dict[str, Any], end: End) -> bool:
    block = peer.get("ipBlock")
    if block or end.address:
        return bool(block and end.address) and _holds(block, end.address)
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], end.namespace):
            return False
    elif end.namespace != OURS:
        return False
    return selects(peer.get("podSelector", {}), end.labels)


def _holds(block: dict[str, Any], address: str) -> bool:
    found = ipaddress.ip_address(address)
    inside = [ipaddress.ip_network(each) for each in (block["cidr"], *block.get("except", ()))]
    return found in inside[0] and not any(found in each for each in inside[1:])


def lets(rule: dict[str, Any], peers: str, end: End, port: int) -> bool:
    if peers in rule and not any(is_peer(peer, end) for peer in rule[peers]):
        return False
    return "ports" not in rule or any(
        each["port"] <= port <= each.get("endPort", each["port"]) for each in rule["ports"] if each["protocol"] == "TCP"
    )


def allowed(near: End, far: End, port: int, direction: str, overlay: str) -> bool:
    """Whether `near` may have a connection to or from `far`; pods of other namespaces and addresses decide for themselves."""
    if near.address or near.namespace != OURS:
        return True
    peers = "to" if direction == "egress" else "from"
    applying = [each for each in policies(overlay) if selects(each["podSelector"], near.labels)]
    applying = [each for each in applying if direction.capitalize() in each["policyTypes"]]
    assert applying, "no policy selects it: everything would be allowed"
    return any(lets(rule, peers, far, port) for each in applying for rule in each.get(direction, ()))


@pytest.mark.parametrize("name", CASES)
def test_who_reaches_whom(name: str) -> None:
    source, target, port, wanted, overlay = CASES[name]
    found = allowed(source, target, port, "egress", overlay) and allowed(target, source, port, "ingress", overlay)
    assert found == wanted


def test_a_policy_cannot_tell_jobs_apart() -> None:
    assert allowed(TRAINER, OTHER, 23456, "egress", ""), "docs/manifests.md says so: a namespace each"
