"""The rights that millrace needs in a namespace: the one list, from which the Role of manifests/ is made and which
`millrace doctor --cluster` asks the cluster about.

Three roles. `launcher` belongs to the service account of the steps and coordinators that start jobs. `person` is for who
starts runs of engine kubernetes, looks at them and ends them from a terminal. `doctor` is about the whole cluster, reads
only, and may be left out: doctor then says what it could not look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LAUNCHER, PERSON, DOCTOR = "launcher", "person", "doctor"
ROLES = (LAUNCHER, PERSON, DOCTOR)
# What they are called in manifests/base.
NAMES = {LAUNCHER: "millrace-launcher", PERSON: "millrace-user", DOCTOR: "millrace-doctor"}
# The service account that has the launcher's.
ACCOUNT = NAMES[LAUNCHER]

_API = "rbac.authorization.k8s.io"

_READ = ("get", "list", "watch")
_RUN = (*_READ, "create", "delete")
# patch: a job that is attached to gets the new step as a further owner, before the old one takes it along.
_OWN = (*_RUN, "patch")


@dataclass(frozen=True)
class Rule:
    """One line of a role.

    Attributes:
        group: API group; empty for the core.
        resource: plural, with the part after a slash where it is only that part: pods/log.
        verbs: of RBAC.
        why: what does not work without.
        roles: which roles have it.
        needs: what is not asked for where the cluster lacks it: pytorchjobs, trainjobs or experiments.
    """

    group: str
    resource: str
    verbs: tuple[str, ...]
    why: str
    roles: tuple[str, ...] = (LAUNCHER,)
    needs: str = ""


RULES: tuple[Rule, ...] = (
    Rule("kubeflow.org", "pytorchjobs", _OWN, "training as a PyTorchJob: start it, watch it, clean it up",
         needs="pytorchjobs"),
    Rule("trainer.kubeflow.org", "trainjobs", _OWN, "training as a TrainJob: start it, watch it, clean it up",
         needs="trainjobs"),
    Rule("trainer.kubeflow.org", "trainingruntimes", ("get", "list", "create", "delete"), "the runtime a TrainJob refers to",
         needs="trainjobs"),
    Rule("kubeflow.org", "experiments", _OWN, "search as a Katib Experiment: start it, watch it, clean it up",
         needs="experiments"),
    Rule("kubeflow.org", "trials", _READ, "how each trial of an Experiment ended", needs="experiments"),
    Rule("kubeflow.org", "suggestions", _READ, "why an Experiment does not begin: only its Suggestion says so",
         needs="experiments"),
    Rule("batch", "jobs", _OWN, "stages as Jobs: start them, watch them, clean them up"),
    Rule("", "pods", (*_READ, "delete"), "which pod waits or failed, and why; pods of a job that is given up are removed"),
    Rule("", "pods/log", ("get",), "the output of what runs, and the last words of what failed"),
    Rule("", "events", _READ, "why a pod does not start: no room, no image, refused by a policy"),
    Rule("", "namespaces", ("get",), "the policy that this namespace enforces: what it would refuse is not tried"),
    Rule("batch", "jobs", _RUN, "a run of engine kubernetes: start it, come back to it, end it", (PERSON,)),
    Rule("", "pods", _READ, "where a run is", (PERSON,)),
    Rule("", "pods/log", ("get",), "the output of a run", (PERSON,)),
    Rule("", "events", _READ, "why a pod does not start", (PERSON,)),
    Rule("kubeflow.org", "pytorchjobs", (*_READ, "delete"), "look at training, and end it", (PERSON,), "pytorchjobs"),
    Rule("trainer.kubeflow.org", "trainjobs", (*_READ, "delete"), "look at training, and end it", (PERSON,), "trainjobs"),
    Rule("kubeflow.org", "experiments", (*_READ, "delete"), "look at a search, and end it", (PERSON,), "experiments"),
    Rule("", "persistentvolumeclaims", ("get",), "doctor: does the volume exist, and can all nodes mount it", (PERSON,)),
    Rule("", "serviceaccounts", ("get",), "doctor: do the service accounts exist that pods run as", (PERSON,)),
    Rule("", "limitranges", ("list",), "doctor: what pods get that ask for nothing", (PERSON,)),
    Rule("", "resourcequotas", ("list",), "doctor: what the namespace may still ask for", (PERSON,)),
    Rule("", "namespaces", ("get",), "doctor: the labels of the namespace", (DOCTOR,)),
    Rule("", "nodes", ("list",), "doctor: processors, memory and accelerators of the nodes", (DOCTOR,)),
    Rule("", "configmaps", ("get",), "doctor: settings of Katib and of Kubeflow Pipelines", (DOCTOR,)),
    Rule("apps", "deployments", ("list",), "doctor: do the operators run", (DOCTOR,)),
    Rule("storage.k8s.io", "storageclasses", ("list",), "doctor: where a volume can come from", (DOCTOR,)),
    Rule("scheduling.k8s.io", "priorityclasses", ("get",), "doctor: does cluster.job.priority_class exist", (DOCTOR,)),
    Rule("kueue.x-k8s.io", "localqueues", ("get",), "doctor: does the queue of Kueue exist", (DOCTOR,)),
    Rule("scheduling.volcano.sh", "queues", ("get",), "doctor: does the queue of Volcano exist", (DOCTOR,)),
)  # fmt: skip


def rules(role: str) -> tuple[Rule, ...]:
    """The lines of a role, in their order."""
    return tuple(rule for rule in RULES if role in rule.roles)


def manifest(role: str, namespace: str = "") -> dict[str, Any]:
    """The Role (a ClusterRole for doctor) as Kubernetes takes it.

    Args:
        role: of ROLES.
        namespace: of the object; a ClusterRole has none.
    """
    whole = role == DOCTOR
    meta = {"name": NAMES[role]} | ({} if whole or not namespace else {"namespace": namespace})
    lines = [
        {"apiGroups": [rule.group], "resources": [rule.resource], "verbs": list(rule.verbs)} for rule in rules(role)
    ]
    kind = "ClusterRole" if whole else "Role"
    return {"apiVersion": f"{_API}/v1", "kind": kind, "metadata": meta, "rules": lines}


def binding(role: str, namespace: str, subject: dict[str, str]) -> dict[str, Any]:
    """The RoleBinding, of the Role's name, that gives it to a subject.

    Args:
        role: LAUNCHER or PERSON.
        namespace: of both.
        subject: as Kubernetes has it: kind, name, and a service account's namespace; a user's API group is added.
    """
    if subject["kind"] != "ServiceAccount":
        subject = {**subject, "apiGroup": _API}
    return {
        "apiVersion": f"{_API}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": NAMES[role], "namespace": namespace},
        "roleRef": {"apiGroup": _API, "kind": "Role", "name": NAMES[role]},
        "subjects": [subject],
    }


def single(role: str, lacking: tuple[str, ...] = ()) -> Iterator[tuple[Rule, str]]:
    """Each verb of a role with its line.

    Args:
        role: of ROLES.
        lacking: operators that the cluster does not have; rights to their kinds are not needed.
    """
    for rule in rules(role):
        if rule.needs not in lacking or not rule.needs:
            for verb in rule.verbs:
                yield rule, verb
