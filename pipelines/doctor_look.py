"""What the checks of `millrace doctor --cluster` share: the cluster, the configuration, and what was found so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from components.launch import kinds, pods
from components.launch.api import Api, ApiError, Object
from components.launch.spec import JobSpec, training
from trainer.config import Params
from trainer.doctor import Finding

# Each question has so long to be answered.
PATIENCE_S = 10.0
# What a dry run and the figures of a pod are made of; nothing of this name is ever made.
PROBE = "millrace-doctor"


@dataclass
class Look:
    """One look at a cluster.

    Attributes:
        api: its API server.
        params: params.yaml: what will be asked of the cluster.
        namespace: where jobs run.
        system: namespace of Katib and Kubeflow Pipelines.
        facts: by name, for `--json` and the list on the screen.
        findings: what is wrong.
        notes: what is worth knowing and stops nothing.
        unseen: `verb resource` of what we may not read.
        lacking: resources of operators that are not installed.
    """

    api: Api
    params: Params
    namespace: str
    system: str = "kubeflow"
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    lacking: tuple[str, ...] = ()

    def finding(self, what: str, why: str, fix: str) -> None:
        """Something is wrong."""
        self.findings.append(Finding(what, why, fix))

    def note(self, what: str, why: str, fix: str) -> None:
        """Something is worth knowing."""
        self.notes.append(Finding(what, why, fix))

    def one(self, kind: str, name: str, namespace: str = "", version: str = "") -> Object | None:
        """An object; empty if there is none, None if we may not look.

        Raises:
            ApiError: the cluster does not answer.
        """
        address = kinds.path(kind, namespace or self.namespace, name, version)
        return self._ask(address, f"get {_resource(kind)}")

    def all(self, kind: str, namespace: str | None = None, **query: str) -> list[Object] | None:
        """Objects of a kind; None if we may not look.

        Args:
            kind: of kinds.KINDS.
            namespace: None looks into all of them.
            query: fieldSelector and the like.

        Raises:
            ApiError: the cluster does not answer.
        """
        found = self._ask(kinds.path(kind, namespace or ""), f"list {_resource(kind)}", query)
        return None if found is None else found.get("items") or []

    def _ask(self, address: str, what: str, query: Mapping[str, str] | None = None) -> Object | None:
        try:
            return self.api.request("GET", address, dict(query or {}), within_s=PATIENCE_S)
        except ApiError as error:
            if error.status == 403:
                if what not in self.unseen:
                    self.unseen.append(what)
                return None
            if error.status == 404:
                return {}
            raise

    def job(self) -> JobSpec:
        """The job that params.yaml asks for; one pod if training runs in the step's own."""
        nodes = self.params.cluster.job.training_nodes
        words = (
            "train",
            "--params",
            "env:MILLRACE_PARAMS",
            "--in",
            "dataset=s3://bucket/dataset",
            "--out",
            "model=s3://bucket/model",
        )
        return training(self.params, name=PROBE, namespace=self.namespace, args=words, nodes=nodes)


def _resource(kind: str) -> str:
    found = kinds.KINDS[kind]
    return f"{found.plural}.{found.group}" if found.group else found.plural


def applied(obj: Object) -> str:
    """A command that makes this object."""
    return f"echo '{json.dumps(obj, separators=(',', ':'))}' | kubectl apply -f -"


def number(quantity: object) -> Fraction:
    """The value of a quantity that the cluster gave; 0 for one that we cannot read."""
    try:
        return pods.number(str(quantity))
    except ValueError:
        return Fraction(0)


def asked(spec: JobSpec) -> dict[str, Fraction]:
    """What each pod of a job asks for: resource name -> amount."""
    return {name: number(value) for name, value in (pods.resources(spec).get("requests") or {}).items()}
