"""`millrace doctor --cluster`: is the cluster fit for what params.yaml asks of it? Reads, and rehearses, but changes nothing."""

from __future__ import annotations

import os
import socket
import statistics
import time
import uuid
from collections.abc import Callable
from typing import Any

import yaml

from components.launch.api import Api, ApiError, Object
from pipelines import doctor_namespace, doctor_nodes, doctor_operators, doctor_rights
from pipelines.doctor_look import PATIENCE_S, Look
from trainer import storage
from trainer.config import Params
from trainer.doctor import Finding
from trainer.errors import MillraceError

_RETRIES = "workflow-controller-configmap"
# A launcher's calls wait for several answers in turn.
_SLOW_S = 1.0
_DNS = ("coredns", "kube-dns")


def examine(
    params: Params, *, namespace: str = "", system: str = "kubeflow", account: str = "", store: str = ""
) -> Look:
    """Look at the cluster that this process is logged in to.

    Args:
        params: what will be asked of it.
        namespace: where jobs run; empty takes that of the login.
        system: namespace of Katib and Kubeflow Pipelines.
        account: service account that launches; empty takes the one of manifests/.
        store: URI that pods write to; empty takes cluster.store.

    Raises:
        MillraceError: there is no cluster, or it does not answer.
    """
    api = Api.connect(namespace)
    look = Look(api, params, api.namespace, system)
    look.facts |= {"server": api.host, "namespace": api.namespace}
    server = _reach(look)
    nodes: list[Object] | None = []
    restricted = True
    _part(look, lambda: doctor_operators.check(look))
    _part(look, lambda: doctor_rights.check(look, account))
    try:
        restricted = doctor_namespace.labels(look)
        nodes = look.all("Node")
    except ApiError as error:
        _broken(look, error)
    _part(look, lambda: doctor_nodes.versions(look, server, nodes or []))
    if nodes is not None:
        _part(look, lambda: doctor_nodes.room(look, nodes))
    _part(look, lambda: _deployments(look))
    _part(look, lambda: doctor_operators.katib(look, restricted))
    _part(look, lambda: doctor_namespace.storage(look, len(nodes or [])))
    _part(look, lambda: doctor_namespace.quota(look))
    _part(look, lambda: doctor_namespace.names(look))
    _part(look, lambda: doctor_operators.rehearsal(look))
    _part(look, lambda: _retries(look))
    _store(look, store or params.cluster.store)
    doctor_rights.unseen(look)
    return look


def _part(look: Look, check: Callable[[], None]) -> None:
    """One check; what it could not ask is a finding, and the others are made all the same."""
    try:
        check()
    except MillraceError as error:
        _broken(look, error)


def _broken(look: Look, error: MillraceError) -> None:
    look.finding(error.message, "a part of the cluster could not be looked at", error.hint or "try again")


def _reach(look: Look) -> str:
    """The server's version; how long it takes to answer is a fact.

    Raises:
        ApiError: it does not answer.
    """
    found, times = look.api.request("GET", "/version", within_s=PATIENCE_S), []
    for _ in range(3):
        began = time.monotonic()
        look.api.request("GET", "/version", within_s=PATIENCE_S)
        times.append(time.monotonic() - began)
    version, latency = str(found.get("gitVersion", "")), statistics.median(times)
    look.facts |= {"version": version, "latency_ms": round(latency * 1000, 1)}
    if latency > _SLOW_S:
        look.note(
            f"the API server takes {latency:.1f} s to answer",
            "jobs are started and their ends noticed that much later; many requests by others can be the cause",
            "kubectl get --raw /readyz?verbose",
        )
    return version


def _deployments(look: Look) -> None:
    """Operators and the name service.

    Raises:
        ApiError: the cluster does not answer.
    """
    found = look.all("Deployment")
    doctor_operators.running(look, found)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        try:
            socket.getaddrinfo("kubernetes.default", 443)
        except OSError as error:
            _no_names(look, f"the name kubernetes.default does not resolve: {error}")
        return
    servers = [each for each in found or [] if each["metadata"]["name"] in _DNS]
    if servers and not any((each.get("status") or {}).get("availableReplicas") for each in servers):
        _no_names(look, f"no pod of {servers[0]['metadata']['name']} is ready")


def _no_names(look: Look, what: str) -> None:
    look.finding(
        what,
        "the pods of a job find each other, and the API server, by name: none of them could begin",
        "kubectl -n kube-system rollout restart deployment coredns; kubectl -n kube-system logs -l k8s-app=kube-dns",
    )


def _store(look: Look, uri: str) -> None:
    """Can the object store be written to, from here at least?"""
    if not uri or not storage.is_remote(uri):
        return
    place = f"{uri.rstrip('/')}/.millrace-doctor-{uuid.uuid4().hex[:8]}"
    try:
        files, path = storage.filesystem(place)
        with storage.explained(place):
            files.pipe_file(path, b"millrace doctor")
            same = files.cat_file(path) == b"millrace doctor"
            files.rm_file(path)
        if not same:
            raise MillraceError(f"{place}: what was written is not what is read")
        look.facts["store"] = uri
    except MillraceError as error:
        look.finding(
            f"the store cannot be used from here: {error.message}",
            "stages read and write their artifacts there; pods may have other credentials and routes than this machine",
            error.hint or "check the URI, the network and the credentials",
        )


def _retries(look: Look) -> None:
    found = look.one("ConfigMap", _RETRIES, look.system)
    note = retry_note((found or {}).get("data") or {}, look.system)
    if note:
        look.notes.append(note)


def retry_note(settings: dict[str, Any], namespace: str) -> Finding | None:
    """What the controller's defaults make of `set_retry`; nothing if a failing command is repeated as asked.

    Kubeflow 2.17's own manifests set `retryPolicy: OnError` for every step, which Argo merges into the step's own
    strategy: then only lost pods are repeated (manifests/kustomize/third-party/argo/base, kubeflow/pipelines).
    """
    try:
        defaults = yaml.safe_load(settings.get("workflowDefaults") or "") or {}
        policy = defaults["spec"]["templateDefaults"]["retryStrategy"]["retryPolicy"]
    except (KeyError, TypeError, yaml.YAMLError):
        return None
    if policy in ("Always", "OnFailure"):
        return None
    return Finding(
        f"Kubeflow Pipelines ignores set_retry for commands that fail: retryPolicy is {policy} in {_RETRIES}",
        "only pods that are lost are tried again; millrace's stages repeat by themselves what a signal killed "
        "(cluster.retries), but components of others in the same pipeline do not",
        f"nothing for millrace's own stages; else set retryPolicy: Always in workflowDefaults with "
        f"`kubectl edit configmap {_RETRIES} -n {namespace}`",
    )


def show(look: Look) -> str:
    """Facts, findings and notes as text for people."""
    facts = look.facts
    kinds = [doctor_operators.OPERATORS[name].kind for name, version in facts.get("kinds", {}).items() if version]
    claim = facts.get("claim")
    lines = {
        "cluster": f"Kubernetes {facts['version']}, answers in {facts['latency_ms']:g} ms",
        "user": facts.get("user", "unknown"),
        "namespace": f"{facts['namespace']}, policy {facts.get('policy', 'unknown')}",
        "kinds": ", ".join(kinds) or "none of the operators",
        "nodes": len(facts["nodes"]) if "nodes" in facts else "unknown",
        "classes": ", ".join(facts.get("storage_classes", {})) or "none seen",
        "claim": f"{claim['phase']}, {', '.join(claim['modes'])}" if claim else "none",
    }
    text = [f"{name:<10}{value}" for name, value in lines.items()]
    for word, listed in (("finding", look.findings), ("note", look.notes)):
        for each in listed:
            text += ["", f"{word}: {each.what}", f"  why: {each.why}", f"  fix: {each.fix}"]
    number = len(look.findings)
    return "\n".join([*text, "", f"{number} findings in the cluster" if number else "the cluster is fit"])
