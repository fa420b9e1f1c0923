"""`millrace doctor --cluster`: are the operators there that turn our objects into pods, and do they take what we send?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from components.launch import pytorchjob, trainjob
from components.launch.api import ApiError, Object
from components.launch.experiment import ALGORITHMS, experiment
from pipelines.doctor_look import PATIENCE_S, PROBE, Look
from pipelines.katib_config import CONFIG_MAP, open_algorithms, settings

INJECT = "katib.kubeflow.org/metrics-collector-injection"
_UPSTREAM = "https://github.com/kubeflow"


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        version: apiVersion of its kind.
        kind: what a person calls it.
        deployment: by which it runs.
        setting: of params.yaml, that asks for it.
        install: command that installs the version we are tested with.
    """

    version: str
    kind: str
    deployment: str
    setting: str
    install: str


OPERATORS: dict[str, Operator] = {
    "pytorchjobs": Operator(
        "kubeflow.org/v1", "PyTorchJob", "training-operator", "cluster.job.train: pytorchjob",
        f"kubectl apply --server-side -k '{_UPSTREAM}/training-operator.git/manifests/overlays/standalone?ref=v1.9.4'",
    ),
    "trainjobs": Operator(
        "trainer.kubeflow.org/v1alpha1", "TrainJob", "kubeflow-trainer-controller-manager", "cluster.job.train: trainjob",
        f"kubectl apply --server-side -k '{_UPSTREAM}/trainer.git/manifests/overlays/manager?ref=v2.3.0'",
    ),
    "experiments": Operator(
        "kubeflow.org/v1beta1", "Experiment", "katib-controller", "cluster.job.tune: experiment",
        f"kubectl apply --server-side -k '{_UPSTREAM}/katib.git/manifests/v1beta1/installs/katib-standalone?ref=v0.19.0'",
    ),
}  # fmt: skip


def needed(look: Look) -> set[str]:
    """Resources of the operators that params.yaml asks for."""
    job = look.params.cluster.job
    trains = {"pytorchjob": {"pytorchjobs"}, "trainjob": {"trainjobs"}}.get(job.train, set())
    return trains | ({"experiments"} if job.tune == "experiment" else set())


def check(look: Look) -> None:
    """Which kinds the cluster knows; sets `look.lacking`.

    Raises:
        ApiError: the cluster does not answer.
    """
    found = {name: _served(look, name, each) for name, each in OPERATORS.items()}
    look.facts["kinds"] = found
    look.lacking = tuple(name for name, version in found.items() if version != OPERATORS[name].version)
    for name in sorted(needed(look) & set(look.lacking)):
        each = OPERATORS[name]
        look.finding(
            f"the cluster has no {each.kind} of {each.version}" + (f", only {found[name]}" if found[name] else ""),
            f"{each.setting} makes one, and the operator that runs it is not installed, or is of another version",
            each.install,
        )


def _served(look: Look, resource: str, operator: Operator) -> str:
    """The version that serves a resource: the one we use, another, or none."""
    group = operator.version.partition("/")[0]
    versions = [each["groupVersion"] for each in _get(look, f"/apis/{group}").get("versions") or []]
    for version in sorted(versions, key=lambda each: each != operator.version):
        listed = _get(look, f"/apis/{version}").get("resources") or []
        if any(each.get("name") == resource for each in listed):
            return str(version)
    return ""


def _get(look: Look, address: str) -> Object:
    try:
        return look.api.request("GET", address, within_s=PATIENCE_S)
    except ApiError as error:
        if error.status in (403, 404):
            return {}
        raise


def running(look: Look, deployments: list[Object] | None) -> None:
    """Do the operators run that are needed?

    Args:
        look: gets the findings.
        deployments: of the whole cluster; None if we may not see them.
    """
    if deployments is None:
        return
    for name in sorted(needed(look) - set(look.lacking)):
        each = OPERATORS[name]
        found = [item for item in deployments if item["metadata"]["name"] == each.deployment]
        if not found:
            look.note(
                f"no deployment is called {each.deployment}",
                f"it turns a {each.kind} into pods; if nothing else does, jobs are taken and nothing happens",
                f"kubectl get deployments -A | grep -i {each.deployment.split('-')[0]}, or install it: {each.install}",
            )
        elif not any((item.get("status") or {}).get("availableReplicas") for item in found):
            place = found[0]["metadata"]["namespace"]
            stopped = not (found[0].get("spec") or {}).get("replicas", 1)
            look.finding(
                f"deployment {each.deployment} in namespace {place} has no pod that is ready",
                f"a {each.kind} is refused, or taken and never run",
                f"kubectl scale deployment {each.deployment} -n {place} --replicas=1"
                if stopped
                else f"kubectl describe pods -n {place}, then kubectl rollout restart deployment {each.deployment} -n {place}",
            )


def rehearsal(look: Look) -> None:
    """Have the API server and the operators' webhooks check, but not make, the objects that params.yaml asks for."""
    objects: list[Object] = []
    job, lacking = look.params.cluster.job, look.lacking
    if job.train == "pytorchjob" and "pytorchjobs" not in lacking:
        objects.append(pytorchjob.pytorchjob(look.job()))
    if job.train == "trainjob" and "trainjobs" not in lacking:
        objects.append(trainjob.trainjob(look.job())[0])  # its TrainJob is refused while this does not exist
    if job.tune == "experiment" and "experiments" not in lacking and look.params.tune.space:
        objects.append(experiment(look.params, name=PROBE, namespace=look.namespace, args=("trial",))[-1])
    for obj in objects:
        try:
            look.api.create(obj, dry_run=True, namespace=look.namespace, within_s=PATIENCE_S)
        except ApiError as error:
            # A right that we lack is a finding of its own, and a person need not have it.
            if error.status != 403 or "cannot create resource" not in error.message:
                _refused(look, obj["kind"], error)


def _refused(look: Look, kind: str, error: ApiError) -> None:
    message = error.message.partition(": ")[2] or error.message
    operator = next(each for each in OPERATORS.values() if each.kind in (kind, kind.replace("ingRuntime", "Job")))
    if INJECT in message:
        if not any(INJECT in each.what for each in look.findings):
            not_injected(look)
        return
    if "calling webhook" in message or "no endpoints available" in message:
        why = f"every {kind} is refused while the operator's webhook does not answer"
        fix = f"kubectl get pods -A | grep {operator.deployment}; restart it with kubectl rollout restart deployment"
    elif "exceeded quota" in message:
        why = f"the {kind} that params.yaml asks for is refused until others end"
        fix = f"kubectl describe resourcequota -n {look.namespace}"
    else:
        why = f"the {kind} that params.yaml asks for is refused"
        fix = f"change cluster.* or tune.* in params.yaml; `millrace render {kind.lower()}` prints the object"
    look.finding(f"{kind}, as a rehearsal: {message}", why, fix)


def not_injected(look: Look) -> None:
    """The namespace's label that Katib demands is not there."""
    look.finding(
        f"namespace {look.namespace} lacks the label {INJECT}=enabled",
        "Katib puts a metrics collector beside trials only where it is, and refuses Experiments elsewhere",
        f"kubectl label --overwrite namespace {look.namespace} {INJECT}=enabled",
    )


def katib(look: Look, restricted: bool) -> None:
    """Katib's configuration: has it the algorithm, and do its pods pass the namespace's policy?

    Args:
        look: gets the findings.
        restricted: the namespace enforces the policy "restricted", as far as we could see.

    Raises:
        ApiError: the cluster does not answer.
    """
    if "experiments" in look.lacking or look.params.cluster.job.tune != "experiment":
        return
    found = look.one("ConfigMap", CONFIG_MAP, look.system)
    if found is None:
        return
    try:
        config = settings(found)
    except (KeyError, TypeError, yaml.YAMLError):
        look.note(
            f"no readable configmap {CONFIG_MAP} in namespace {look.system}",
            "the algorithms that Katib has, and the rights of its pods, could not be looked at",
            "millrace doctor --cluster --system NAMESPACE-OF-KATIB",
        )
        return
    _algorithms(look, config, _used(look, restricted))
    if not restricted:
        return
    restart = f"kubectl rollout restart deployment katib-controller -n {look.system}"
    mended = f"python -m pipelines.katib_config --namespace {look.system} | kubectl apply -f - && {restart}"
    bare = open_algorithms(config, _used(look, restricted))
    if bare:
        look.finding(
            f"Katib's {', '.join(bare)} has no restricted securityContext in configmap {CONFIG_MAP}",
            f"namespace {look.namespace} refuses the pod that suggests values: the Experiment stays in Created for ever",
            mended,
        )
    if look.params.tune.pruner == "median":
        look.note(
            f"tune.pruner median is left out in namespace {look.namespace}, which enforces restricted",
            "Katib 0.19 gives the container that stops trials early no security context, and no setting adds one",
            "nothing if all trials may run to their end; else set cluster.job.tune: pod for Optuna's own pruner",
        )
    if not ((config.get("init") or {}).get("controller") or {}).get("injectSecurityContext"):
        look.finding(
            f"Katib's init.controller.injectSecurityContext is not true in configmap {CONFIG_MAP}",
            f"namespace {look.namespace} refuses every trial: the metrics collector beside it has no security context",
            mended,
        )


def _used(look: Look, restricted: bool) -> Sequence[str]:
    tune = look.params.tune
    stops = tune.pruner == "median" and not restricted
    return [ALGORITHMS[tune.sampler], *(["medianstop"] if stops else [])]


def _algorithms(look: Look, config: dict[str, Any], used: Sequence[str]) -> None:
    runtime = config.get("runtime") or {}
    there = [each.get("algorithmName") for key in ("suggestions", "earlyStoppings") for each in runtime.get(key) or []]
    for name in used:
        if name not in there:
            setting = "tune.pruner" if name == "medianstop" else f"tune.sampler: {look.params.tune.sampler}"
            look.finding(
                f"Katib has no algorithm {name}, which {setting} asks for",
                "the Experiment is refused",
                f"take another in params.yaml (Katib here: {', '.join(map(str, there))}), or add it with "
                f"kubectl edit configmap {CONFIG_MAP} -n {look.system}",
            )
