"""`millrace doctor --cluster`: the namespace that jobs run in: its labels, volume, quota, queue and priorities."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from components.launch.api import Object
from pipelines.doctor_look import Look, applied, asked, number
from pipelines.doctor_operators import INJECT, needed, not_injected

_ENFORCE = "pod-security.kubernetes.io/enforce"
_DEFAULT = "storageclass.kubernetes.io/is-default-class"
# Ends of provisioners' names -> can all nodes mount a volume of theirs? A StorageClass does not say so itself.
_SHARED = ("efs.csi.aws.com", "fsx.csi.aws.com", "file.csi.azure.com", "kubernetes.io/azure-file", "smb.csi.k8s.io",
           "filestore.csi.storage.gke.io", "lustre.csi.storage.gke.io", "nfs.csi.k8s.io", "cephfs.csi.ceph.com",
           "nfs-subdir-external-provisioner")  # fmt: skip
_ALONE = ("ebs.csi.aws.com", "kubernetes.io/aws-ebs", "pd.csi.storage.gke.io", "kubernetes.io/gce-pd", "disk.csi.azure.com",
          "kubernetes.io/azure-disk", "rancher.io/local-path", "rbd.csi.ceph.com")  # fmt: skip
_MANY = "ReadWriteMany"


def labels(look: Look) -> bool:
    """The namespace and its labels; true if it enforces the policy "restricted", or we may not see.

    Raises:
        ApiError: the cluster does not answer.
    """
    found = look.one("Namespace", look.namespace)
    if found is None:
        return True
    if not found:
        look.finding(
            f"namespace {look.namespace} does not exist",
            "jobs run in it",
            f"kubectl create namespace {look.namespace}, or `kubectl apply -k` an overlay of manifests/",
        )
        return False
    given = found["metadata"].get("labels") or {}
    policy = str(given.get(_ENFORCE, ""))
    look.facts["policy"] = policy or "none"
    if not policy:
        look.note(
            f"namespace {look.namespace} enforces no Pod Security policy",
            "millrace's pods pass the strictest one; without it, others in the namespace may run as root on its nodes",
            f"kubectl label namespace {look.namespace} {_ENFORCE}=restricted",
        )
    if "experiments" in needed(look) and given.get(INJECT) != "enabled":
        not_injected(look)
    if policy == "restricted" and look.params.cluster.job.master and look.params.cluster.job.train == "pytorchjob":
        look.finding(
            f"cluster.job.master cannot work in namespace {look.namespace}, which enforces restricted",
            "the operator gives workers of a PyTorchJob with a master an init container that the policy refuses",
            "set cluster.job.master: false in params.yaml",
        )
    return policy == "restricted"


def storage(look: Look, nodes: int) -> None:
    """Storage classes, and the volume that cluster.claim names.

    Args:
        look: gets the findings.
        nodes: of the cluster; 0 if unknown.

    Raises:
        ApiError: the cluster does not answer.
    """
    classes = look.all("StorageClass") or []
    look.facts["storage_classes"] = {
        each["metadata"]["name"]: {"provisioner": each.get("provisioner"), "default": _is_default(each),
                                   "shared": _shared(each)}
        for each in classes
    }  # fmt: skip
    cluster = look.params.cluster
    if not cluster.claim:
        if cluster.job.launched and not cluster.store:
            look.finding(
                "neither cluster.store nor cluster.claim is set in params.yaml",
                "jobs read and write datasets and models by URI, in an object store or on a volume that all pods mount",
                f"set cluster.claim: millrace, and {_claim(look, classes, 'millrace')}",
            )
        return
    found = look.one("PersistentVolumeClaim", cluster.claim)
    if found is None:
        return
    if not found:
        look.finding(
            f"claim {cluster.claim} (cluster.claim) does not exist in namespace {look.namespace}",
            "every pod mounts it, and waits for ever without",
            _claim(look, classes, cluster.claim),
        )
        return
    _bound(look, found, classes)
    modes = found["spec"].get("accessModes") or []
    look.facts["claim"] = {"phase": (found.get("status") or {}).get("phase"), "modes": modes}
    if _MANY not in modes and nodes != 1:
        several = cluster.job.nodes > 1 and cluster.job.train != "pod"
        (look.finding if several else look.note)(
            f"claim {cluster.claim} is {', '.join(modes)}, not {_MANY}",
            "its pods all have to run on one node; those that are scheduled to another one wait for ever",
            f"make a claim of another name, and name it in cluster.claim: {_claim(look, classes, cluster.claim + '-shared')}",
        )


def _bound(look: Look, claim: Object, classes: list[Object]) -> None:
    phase, name = (claim.get("status") or {}).get("phase"), claim["metadata"]["name"]
    if phase == "Bound":
        return
    wanted = claim["spec"].get("storageClassName")
    found = next((each for each in classes if each["metadata"]["name"] == wanted), {})
    if phase == "Pending" and found.get("volumeBindingMode") == "WaitForFirstConsumer":
        return  # as it should be, until the first pod
    events = look.all("Event", look.namespace, fieldSelector=f"involvedObject.name={name}") or []
    failures = [str(each.get("message")) for each in events if each.get("type") == "Warning"]
    unknown = f"its class {wanted} does not exist" if wanted and classes and not found else ""
    said = failures[-1] if failures else unknown
    slow = "; nothing has failed so far, and a volume takes a minute to make" if not said and phase == "Pending" else ""
    (look.note if slow else look.finding)(
        f"claim {name} is {phase}, not Bound" + (f": {said}" if said else slow),
        "every pod mounts it, and waits until it is bound",
        f"kubectl describe pvc {name} -n {look.namespace}"
        if slow
        else f"kubectl delete pvc {name} -n {look.namespace} && {_claim(look, classes, name)}",
    )


def _is_default(each: Object) -> bool:
    return (each["metadata"].get("annotations") or {}).get(_DEFAULT) == "true"


def _shared(each: Object) -> bool | None:
    provisioner = str(each.get("provisioner"))
    if provisioner.endswith(_SHARED):
        return True
    return False if provisioner.endswith(_ALONE) else None


def _claim(look: Look, classes: list[Object], name: str) -> str:
    """The command that makes a claim, of a class that all nodes can mount if there is one."""
    best = sorted(classes, key=lambda each: (_shared(each) is not True, not _is_default(each), _shared(each) is False))
    spec: dict[str, Any] = {"accessModes": [_MANY], "resources": {"requests": {"storage": "10Gi"}}}
    if best and not _is_default(best[0]):
        spec["storageClassName"] = best[0]["metadata"]["name"]
    if best and _shared(best[0]) is False:
        spec["accessModes"] = ["ReadWriteOnce"]
    meta = {"name": name, "namespace": look.namespace}
    return applied({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec})


def quota(look: Look) -> None:
    """What quotas leave for the job that params.yaml asks for.

    Raises:
        ApiError: the cluster does not answer.
    """
    spec = look.job()
    each = asked(spec)
    need: dict[str, Fraction] = {f"requests.{name}": spec.nodes * amount for name, amount in each.items()}
    need |= {name: need[f"requests.{name}"] for name in ("cpu", "memory") if f"requests.{name}" in need}
    need |= {"pods": Fraction(spec.nodes), "limits.memory": spec.nodes * each.get("memory", Fraction(0))}
    for item in look.all("ResourceQuota", look.namespace) or []:
        status, name = item.get("status") or {}, item["metadata"]["name"]
        hard, used = status.get("hard") or {}, status.get("used") or {}
        look.facts.setdefault("quota", {})[name] = {key: f"{used.get(key, 0)} of {hard[key]}" for key in hard}
        for key in sorted(set(hard) & set(need)):
            most, left = number(hard[key]), number(hard[key]) - number(used.get(key, "0"))
            if need[key] > most:
                look.finding(
                    f"quota {name} allows {key} of {hard[key]}, the job of params.yaml asks for {_plain(need[key])}",
                    "its pods are never made",
                    f"ask for less in params.yaml, or kubectl patch resourcequota {name} -n {look.namespace} --type merge "
                    f'-p \'{{"spec":{{"hard":{{"{key}":"{_plain(need[key])}"}}}}}}\'',
                )
            elif need[key] > left:
                look.note(
                    f"quota {name} has {key} of {_plain(left)} left, the job of params.yaml asks for {_plain(need[key])}",
                    "its pods are made only when others have ended",
                    f"kubectl describe resourcequota {name} -n {look.namespace}; kubectl get pods -n {look.namespace}",
                )
        if "limits.cpu" in hard:
            _processors(look, name)


def _processors(look: Look, name: str) -> None:
    """A quota on limits.cpu refuses pods without one, and ours have none: they may use processors that nobody needs."""
    for item in look.all("LimitRange", look.namespace) or []:
        for limit in item["spec"].get("limits") or []:
            if limit.get("type") == "Container" and "cpu" in (limit.get("default") or {}):
                return
    meta = {"name": "millrace-cpu", "namespace": look.namespace}
    limits = {"limits": [{"type": "Container", "default": {"cpu": "8"}, "defaultRequest": {"cpu": "100m"}}]}
    look.finding(
        f"quota {name} is about limits.cpu, and no LimitRange gives pods one",
        "pods without a limit of processors, as millrace's are, are refused",
        applied({"apiVersion": "v1", "kind": "LimitRange", "metadata": meta, "spec": limits}),
    )


def _plain(value: Fraction) -> str:
    return str(int(value)) if value.denominator == 1 else f"{float(value):g}"


def names(look: Look) -> None:
    """Do queue, priority class and service account of params.yaml exist?

    Raises:
        ApiError: the cluster does not answer.
    """
    job = look.params.cluster.job
    if job.priority_class and look.one("PriorityClass", job.priority_class) == {}:
        look.finding(
            f"priority class {job.priority_class} (cluster.job.priority_class) does not exist",
            "pods that name it are refused",
            f"kubectl create priorityclass {job.priority_class} --value=1000 --preemption-policy=Never",
        )
    if job.service_account and look.one("ServiceAccount", job.service_account) == {}:
        look.finding(
            f"service account {job.service_account} (cluster.job.service_account) does not exist in {look.namespace}",
            "pods that run as it are never made",
            f"kubectl create serviceaccount {job.service_account} -n {look.namespace}",
        )
    if job.scheduler == "kueue":
        _kueue(look, job.queue)
    if job.scheduler == "volcano":
        _volcano(look, job.queue)


def _version(look: Look, group: str) -> str:
    """The preferred version of an API group; empty without the group."""
    groups = look.api.request("GET", "/apis", within_s=10.0).get("groups") or []
    return next((str(each["preferredVersion"]["groupVersion"]) for each in groups if each["name"] == group), "")


def _kueue(look: Look, queue: str) -> None:
    version = _version(look, "kueue.x-k8s.io")
    if not version:
        look.finding(
            "the cluster has no Kueue, which cluster.job.scheduler names",
            "a job with its label is run at once by some operators, and stays suspended for ever with others",
            "install it (kueue.sigs.k8s.io/docs/installation), or set cluster.job.scheduler: default and an empty queue",
        )
        return
    found = look.one("LocalQueue", queue, version=version)
    if found == {}:
        meta = {"name": queue, "namespace": look.namespace}
        made = {"apiVersion": version, "kind": "LocalQueue", "metadata": meta, "spec": {"clusterQueue": queue}}
        look.finding(
            f"LocalQueue {queue} (cluster.job.queue) does not exist in namespace {look.namespace}",
            "jobs for it stay suspended",
            f"kubectl get clusterqueues, and with the name of one: {applied(made)}",
        )
    for condition in ((found or {}).get("status") or {}).get("conditions") or []:
        if condition.get("type") == "Active" and condition.get("status") == "False":
            look.finding(
                f"LocalQueue {queue} is not active: {condition.get('message')}",
                "jobs for it stay suspended",
                f"kubectl describe localqueue {queue} -n {look.namespace}",
            )


def _volcano(look: Look, queue: str) -> None:
    version = _version(look, "scheduling.volcano.sh")
    if not version:
        look.finding(
            "the cluster has no Volcano, which cluster.job.scheduler names",
            "pods that wait for its scheduler are never placed",
            "install it (volcano.sh/docs/installation), or set cluster.job.scheduler: default and an empty queue",
        )
        return
    found = look.one("Queue", queue, version=version)
    if found == {}:
        made = {"apiVersion": version, "kind": "Queue", "metadata": {"name": queue}, "spec": {"weight": 1}}
        look.finding(f"Volcano's queue {queue} (cluster.job.queue) does not exist", "jobs for it wait", applied(made))
    elif found and (found.get("status") or {}).get("state", "Open") != "Open":
        look.finding(
            f"Volcano's queue {queue} is {found['status']['state']}",
            "jobs for it wait",
            f"vcctl queue operate -n {queue} -a open",
        )
