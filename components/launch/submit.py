"""Make a job, or find the one that was made before; and take it away with all its pods.

The name is that of the output, so a launcher that was killed, and is started again, finds its job: there is only one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from components.launch import names, observe, security
from components.launch.api import Api, ApiError, Object
from components.launch.spec import JobSpec
from trainer.errors import ConfigError, MillraceError

Out = Callable[[str], None]

# Seconds within which the API server must answer before a job is called lost to us; it goes on meanwhile.
API_S = 300.0
# Beyond a pod's own grace: the kubelet's and the garbage collector's part in its end.
REMOVAL_S = 30.0
_POLL_S = 0.5


def enforces_restricted(api: Api) -> bool:
    """Whether the client's namespace enforces the policy restricted; true if it may not be looked at."""
    try:
        return security.enforced(api.get("Namespace", api.namespace, within_s=API_S))
    except ApiError:
        return True


def attach(api: Api, spec: JobSpec, manifest: Sequence[Object], out: Out) -> Object:
    """The job as it stands in the cluster: made now, or found.

    Args:
        api: the API server.
        spec: what is asked for.
        manifest: the job, after the objects that it refers to.
        out: told what was found.

    Raises:
        ConfigError: another job of this name is there, and has not ended.
        ApiError: the API server refuses the objects.
    """
    for _ in range(10):
        job = manifest[-1]
        found = _find(api, job["kind"], spec.name, spec.namespace)
        if found is None:
            made = _create(api, spec, manifest, out)
            if made is not None:
                return made
        elif _usable(api, spec, job, found, manifest, out):
            return found
    raise MillraceError(
        f"{spec.name}: made and removed by others again and again", "let one launcher at a time start it"
    )


def _find(api: Api, kind: str, name: str, namespace: str, within_s: float = API_S) -> Object | None:
    try:
        return api.get(kind, name, namespace=namespace, within_s=within_s)
    except ApiError as error:
        if error.status != 404:
            raise
        return None


def _create(api: Api, spec: JobSpec, manifest: Sequence[Object], out: Out) -> Object | None:
    """Make all objects; None if somebody else made the job at the same time."""
    _wait_for_no_pods(api, spec, spec.grace_s + REMOVAL_S)  # of a job of this name that was removed just now
    for obj in manifest[:-1]:
        _replace(api, spec, obj)
    try:
        made = api.create(manifest[-1], namespace=spec.namespace, within_s=API_S)
    except ApiError as error:
        if error.status != 409:
            raise
        return None
    out(f"{made['kind']} {spec.name}: started in namespace {spec.namespace or api.namespace}")
    return made


def _replace(api: Api, spec: JobSpec, obj: Object) -> None:
    """An object that the job refers to, as it is asked for now: the one of an earlier job may differ."""
    kind, name = obj["kind"], obj["metadata"]["name"]
    found = _find(api, kind, name, spec.namespace)
    if found and _digest(found) == _digest(obj):
        return
    if found:
        api.delete(kind, name, namespace=spec.namespace, within_s=API_S)
    try:
        api.create(obj, namespace=spec.namespace, within_s=API_S)
    except ApiError as error:
        if error.status != 409:
            raise


def _digest(obj: Object) -> str:
    return str((obj["metadata"].get("annotations") or {}).get(names.SPEC_ANNOTATION) or "")


def _usable(api: Api, spec: JobSpec, job: Object, found: Object, manifest: Sequence[Object], out: Out) -> bool:
    """Whether to attach to a job; False once one that is of no use any more has been removed."""
    kind, state = job["kind"], _ended(found)
    if found["metadata"].get("deletionTimestamp"):
        out(f"{kind} {spec.name}: an earlier one is being removed")
        _wait_for_no_job(api, spec, kind)
        return False
    ours, same = _is_ours(found), _digest(found) == _digest(job)
    if not ours or (not same and state not in ("succeeded", "failed")):
        place = spec.namespace or api.namespace
        what = "that asks for something else" if ours else "that somebody else made"
        message = f"{kind} {spec.name} in namespace {place}: there is one already {what}"
        raise ConfigError(message, f"kubectl -n {place} delete {kind.lower()} {spec.name}, or give another --name")
    if not same or state == "failed":
        why = "an earlier attempt failed" if same else "an earlier one, of other parameters or inputs, has ended"
        out(f"{kind} {spec.name}: {why}; it is removed and started again")
        remove(api, spec, manifest, uid=found["metadata"]["uid"])
        return False
    _own(api, spec, found)
    ended = ", which has ended" if state == "succeeded" else ""
    out(f"{kind} {spec.name}: attached to the one started at {found['metadata']['creationTimestamp']}{ended}")
    return True


def _is_ours(found: Object) -> bool:
    return (found["metadata"].get("labels") or {}).get("app.kubernetes.io/managed-by") == names.MANAGER


def _ended(found: Object) -> observe.State:
    """How a job stands, by its own conditions and by what a launcher has found out about its pods."""
    refuted = names.REFUTED_ANNOTATION in (found["metadata"].get("annotations") or {})
    return "failed" if refuted else observe.condition(found)[0]


def refute(api: Api, spec: JobSpec, job: Object, reason: str) -> None:
    """Write on a job that says it succeeded that it did not: the next launcher must not take it for a success.

    Args:
        api: the API server.
        spec: the job.
        job: as it stands.
        reason: one word.
    """
    change = {"metadata": {"annotations": {names.REFUTED_ANNOTATION: reason}}}
    api.patch(job["kind"], spec.name, change, namespace=spec.namespace, within_s=API_S)


def _own(api: Api, spec: JobSpec, found: Object) -> None:
    """Let a job go away with the step that waits for it now, too: the step that made it may go first."""
    owners = list(found["metadata"].get("ownerReferences") or [])
    if spec.owner and spec.owner.get("uid") not in [each.get("uid") for each in owners]:
        change = {"metadata": {"ownerReferences": [*owners, dict(spec.owner)]}}
        api.patch(found["kind"], spec.name, change, namespace=spec.namespace, within_s=API_S)


def remove(
    api: Api,
    spec: JobSpec,
    manifest: Sequence[Object],
    *,
    uid: str = "",
    out: Out | None = None,
    within_s: float = API_S,
) -> None:
    """Delete a job and wait until its pods are gone.

    Args:
        api: the API server.
        spec: the job.
        manifest: its objects.
        uid: delete only this one, and not another that has got the same name since.
        out: told if pods do not go.
        within_s: seconds in which the API server must take the request.
    """
    for obj in reversed(manifest):
        try:
            api.delete(
                obj["kind"], obj["metadata"]["name"], propagation="Foreground", namespace=spec.namespace,
                uid=uid if obj is manifest[-1] else "", within_s=within_s,
            )  # fmt: skip
        except ApiError as error:
            if error.status != 409:
                raise
            if obj is manifest[-1]:  # another one, that somebody has made since
                return
    _wait_for_no_job(api, spec, manifest[-1]["kind"])
    left = _wait_for_no_pods(api, spec, spec.grace_s + REMOVAL_S)
    if left and out:
        out(f"{spec.name}: still there after {spec.grace_s + REMOVAL_S:g} s: {', '.join(left)}; their node may be down")


def withdraw(
    api: Api, spec: JobSpec, manifest: Sequence[Object], *, uid: str, out: Out | None = None, within_s: float = API_S
) -> None:
    """Remove the job that we wait for, or were just about to make: never one that somebody else made, or asked for.

    Args:
        api: the API server.
        spec: the job.
        manifest: its objects.
        uid: of the job; empty if it was not known yet.
        out: told if pods do not go.
        within_s: seconds in which the API server must take each request.
    """
    if not uid:
        found = _find(api, manifest[-1]["kind"], spec.name, spec.namespace, within_s)
        if found is None or not _is_ours(found) or _digest(found) != _digest(manifest[-1]):
            return
        uid = found["metadata"]["uid"]
    remove(api, spec, manifest, uid=uid, out=out, within_s=within_s)


def remove_pods(api: Api, spec: JobSpec, pods: Sequence[str], out: Out) -> None:
    """Delete pods of a job that has ended and left them running, and wait until they are gone."""
    for name in pods:
        api.delete("Pod", name, namespace=spec.namespace, within_s=API_S)
    left = _wait_for_no_pods(api, spec, spec.grace_s + REMOVAL_S, set(pods))
    if left:
        out(f"{spec.name}: still there after {spec.grace_s + REMOVAL_S:g} s: {', '.join(left)}; their node may be down")


def _wait_for_no_job(api: Api, spec: JobSpec, kind: str) -> None:
    for _ in _until(spec.grace_s + REMOVAL_S):
        if _find(api, kind, spec.name, spec.namespace) is None:
            return


def _wait_for_no_pods(api: Api, spec: JobSpec, within_s: float, among: Container[str] | None = None) -> list[str]:
    """Names of the pods that are left then."""
    left: list[str] = []
    for _ in _until(within_s):
        found = api.list("Pod", label_selector=selector(spec.name), namespace=spec.namespace, within_s=API_S)
        left = [name for name in (pod["metadata"]["name"] for pod in found) if among is None or name in among]
        if not left:
            break
    return left


def _until(within_s: float) -> Iterator[None]:
    end = time.monotonic() + within_s
    while True:
        yield
        if time.monotonic() > end:
            return
        time.sleep(_POLL_S)


def selector(name: str) -> str:
    """What chooses the pods of a job."""
    return f"{names.JOB_LABEL}={name}"


def step_owner(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The ownerReference to the pod of our own step of Kubeflow; None outside of one."""
    name, uid = environ.get("KFP_POD_NAME"), environ.get("KFP_POD_UID")
    if not name or not uid:
        return None
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}
