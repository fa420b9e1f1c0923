"""`millrace doctor`: is this machine fit for the stages, and does the cluster's Kubeflow do what one would think?"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import yaml

from trainer import doctor
from trainer.doctor import Finding
from trainer.errors import EXIT_BAD_INPUT, EXIT_OK, MillraceError

_CONFIG_MAP = "workflow-controller-configmap"
_TIMEOUT_S = 10


def run(cluster: bool, namespace: str, as_json: bool) -> int:
    """Print facts and findings; returns 0, or 2 if something is wrong here. What Kubeflow does otherwise is a note.

    Args:
        cluster: also look at the cluster that KUBECONFIG names.
        namespace: where Kubeflow Pipelines is installed.
        as_json: for machines.

    Raises:
        MillraceError: the cluster cannot be asked.
    """
    report = doctor.examine()
    notes = [note for note in [retry_note(controller(namespace), namespace)] if note] if cluster else []
    if as_json:
        found = {"findings": report.findings, "notes": notes}
        content = {name: [dataclasses.asdict(each) for each in listed] for name, listed in found.items()}
        print(json.dumps({**report.facts, **content, "sane": not report.findings}))
    else:
        print(doctor.show(report))
        for note in notes:
            print(f"\nnote: {note.what}\n  why: {note.why}\n  fix: {note.fix}")
        if cluster and not notes:
            print(f"\nKubeflow in namespace {namespace}: nothing to note")
    return EXIT_BAD_INPUT if report.findings else EXIT_OK


def controller(namespace: str) -> dict[str, Any]:
    """The workflow controller's ConfigMap: key -> text.

    Raises:
        MillraceError: there is no cluster, no such ConfigMap, or no right to read it.
    """
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        if not os.environ.get("KUBECONFIG") and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG") or None)
    except Exception as error:  # what a broken kubeconfig raises has no class in common
        raise MillraceError(f"no cluster: {error}", "set KUBECONFIG, or use `kubectl config use-context`") from None
    try:
        found = client.CoreV1Api().read_namespaced_config_map(_CONFIG_MAP, namespace, _request_timeout=_TIMEOUT_S)
    except ApiException as error:
        where = f"configmap {_CONFIG_MAP} in namespace {namespace}"
        fixes = {
            404: "name the namespace of Kubeflow Pipelines: --namespace NAME",
            401: "log in again: the cluster does not know you",
            403: f"ask for the right: kubectl auth can-i get configmaps -n {namespace}",
        }
        message = f"{where}: {error.status} {error.reason}"
        raise MillraceError(message, fixes.get(error.status, "look at the cluster")) from None
    except (HTTPError, OSError) as error:
        raise MillraceError(
            f"the cluster does not answer: {type(error).__name__}", "check KUBECONFIG and VPN"
        ) from None
    return dict(found.data or {})


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
        f"Kubeflow Pipelines ignores set_retry for commands that fail: retryPolicy is {policy} in {_CONFIG_MAP}",
        "only pods that are lost are tried again; millrace's stages repeat by themselves what a signal killed "
        "(cluster.retries), but components of others in the same pipeline do not",
        f"nothing for millrace's own stages; else set retryPolicy: Always in workflowDefaults with "
        f"`kubectl edit configmap {_CONFIG_MAP} -n {namespace}`",
    )
