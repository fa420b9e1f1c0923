"""The kinds of objects that we read or write, and where each is found at the API server."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from trainer.errors import MillraceError


@dataclass(frozen=True)
class Kind:
    """One kind: `version` is its apiVersion, `plural` the word in its address and in a Role."""

    version: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """The API group, as a Role names it; empty for the core."""
        return self.version.rpartition("/")[0]


KINDS: dict[str, Kind] = {
    "ConfigMap": Kind("v1", "configmaps"),
    "Event": Kind("v1", "events"),
    "Namespace": Kind("v1", "namespaces", False),
    "Node": Kind("v1", "nodes", False),
    "PersistentVolumeClaim": Kind("v1", "persistentvolumeclaims"),
    "Pod": Kind("v1", "pods"),
    "ResourceQuota": Kind("v1", "resourcequotas"),
    "LimitRange": Kind("v1", "limitranges"),
    "Secret": Kind("v1", "secrets"),
    "Service": Kind("v1", "services"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "Deployment": Kind("apps/v1", "deployments"),
    "Job": Kind("batch/v1", "jobs"),
    "CronJob": Kind("batch/v1", "cronjobs"),
    "Role": Kind("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "StorageClass": Kind("storage.k8s.io/v1", "storageclasses", False),
    "PriorityClass": Kind("scheduling.k8s.io/v1", "priorityclasses", False),
    "CustomResourceDefinition": Kind("apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "SelfSubjectAccessReview": Kind("authorization.k8s.io/v1", "selfsubjectaccessreviews", False),
    "LocalSubjectAccessReview": Kind("authorization.k8s.io/v1", "localsubjectaccessreviews"),
    "SelfSubjectReview": Kind("authentication.k8s.io/v1", "selfsubjectreviews", False),
    "PyTorchJob": Kind("kubeflow.org/v1", "pytorchjobs"),
    "TrainJob": Kind("trainer.kubeflow.org/v1alpha1", "trainjobs"),
    "TrainingRuntime": Kind("trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
    "Experiment": Kind("kubeflow.org/v1beta1", "experiments"),
    "Suggestion": Kind("kubeflow.org/v1beta1", "suggestions"),
    "Trial": Kind("kubeflow.org/v1beta1", "trials"),
    "LocalQueue": Kind("kueue.x-k8s.io/v1beta1", "localqueues"),
    "Queue": Kind("scheduling.volcano.sh/v1beta1", "queues", False),
}


def path(kind: str, namespace: str = "", name: str = "", version: str = "") -> str:
    """The address of an object, or of all of a kind, at the API server.

    Args:
        kind: of KINDS.
        namespace: not used for kinds that belong to the whole cluster.
        name: empty for all of the kind.
        version: apiVersion, where it is not the one of KINDS.

    Raises:
        MillraceError: the kind is not known here.
    """
    found = KINDS.get(kind)
    if found is None:
        raise MillraceError(f"kind {kind!r} is not known to the launcher", f"use one of {', '.join(KINDS)}")
    version = version or found.version
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    place = f"/namespaces/{quote(namespace, safe='')}" if found.namespaced and namespace else ""
    return f"{root}{place}/{found.plural}" + (f"/{quote(name, safe='')}" if name else "")
