"""manifests/ on a real cluster: every overlay builds and the API server takes it strictly, `kubectl apply -k` of overlay kind
does what it says, and the samples run as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.launch import rbac
from tests import kube
from tests.kube import ROOT, Object, condition, get, kubectl, wait_for
from trainer.config import Params

pytestmark = pytest.mark.cluster
MANIFESTS = ROOT / "manifests"
SAMPLES = MANIFESTS / "samples"
NAMESPACE = "millrace"
LAUNCHER = f"system:serviceaccount:{NAMESPACE}:{rbac.ACCOUNT}"
TRAINER = f"system:serviceaccount:{NAMESPACE}:millrace"
OVERLAYS = ("kind", "eks", "gke", "aks")
COMPONENTS = ("kueue", "volcano", "networkpolicy")
# Kinds of these groups are checked by the API server where it knows them, and by tests/unit/test_manifests.py.
QUEUES = ("kueue.x-k8s.io", "scheduling.volcano.sh")


@pytest.fixture(scope="module")
def overlay(kubeconfig: str) -> Iterator[None]:
    """Overlay kind, applied as a person would; removed with all that was in the namespace."""
    if NAMESPACE in kubectl("get", "namespaces", "-o", "name").replace("namespace/", "").split():
        pytest.fail(
            f"namespace {NAMESPACE} is in use: this test would remove it; `kubectl delete namespace {NAMESPACE}`"
        )
    folder = str(MANIFESTS / "overlays" / "kind")
    try:
        said = kubectl("apply", "-k", folder, ok=False)
        assert "would violate" not in said
        assert "rror" not in said
        yield
    finally:
        kubectl("delete", "-k", folder, "--ignore-not-found", "--timeout=150s", deadline_s=180)


@pytest.fixture(scope="module")
def dataset(overlay: None) -> None:
    """What sample data.yaml makes."""
    run_sample("data.yaml")
    ended("job", "sample-data", "Complete")


@pytest.fixture(autouse=True)
def _explained(request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        kube.explain(NAMESPACE)


def run_sample(name: str) -> None:
    """`kubectl apply -f`; kubectl prints what a namespace's policy would refuse. Images come from where E2E_IMAGES says."""
    text = (SAMPLES / name).read_text(encoding="utf-8")
    usual = Params().cluster.image_prefix
    if usual != kube.REGISTRY:
        text = text.replace(f"image: {usual}/", f"image: {kube.REGISTRY}/")
        text = text.replace("      claim: millrace\n", f"      claim: millrace\n      image_prefix: {kube.REGISTRY}\n")
    said = kubectl("apply", "--validate=strict", "-f", "-", given=text, ok=False)
    assert "would violate" not in said
    assert "rror" not in said


def ended(kind: str, name: str, wanted: str, deadline_s: float = 240) -> Object:
    """The object once its condition `wanted` is true; fails as soon as it has failed."""

    def probe() -> Object | None:
        text = kubectl("-n", NAMESPACE, "get", kind, name, "-o", "json", ok=False)
        if not text.startswith("{"):
            return None  # the API server is away for a moment
        obj: Object = json.loads(text)
        bad = condition(obj, "Failed")
        assert not bad, bad
        return obj if condition(obj, wanted) else None

    found = wait_for(f"{kind} {name} is {wanted}", probe, deadline_s)
    assert found
    return found


def built(folder: Path) -> list[Object]:
    return [each for each in yaml.safe_load_all(kubectl("kustomize", str(folder))) if each]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_builds_with_every_component_and_the_server_takes_it(
    name: str, overlay: None, tmp_path: Path
) -> None:
    near = Path(os.path.relpath(MANIFESTS, tmp_path.resolve()))
    with_network = "components:" in (MANIFESTS / "overlays" / name / "kustomization.yaml").read_text(encoding="utf-8")
    further = [each for each in COMPONENTS if each != "networkpolicy" or not with_network]
    settings = {
        "resources": [str(near / "overlays" / name)],
        "components": [str(near / "components" / each) for each in further],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    objects = built(tmp_path)
    assert {"ClusterQueue", "Queue", "NetworkPolicy", "Role", "PersistentVolumeClaim"} <= {
        each["kind"] for each in objects
    }
    text = yaml.safe_dump_all(objects)
    assert "set-by" not in text, "a place that nothing from settings.env was put into"
    known = kubectl("api-resources", "-o", "name")
    sent = [each for each in objects if not _is_queue(each) or each["apiVersion"].split("/")[0] in known]
    # The claim that is there is bound to its class, and the quota that is there is small.
    for each in sent:
        if each["kind"] == "PersistentVolumeClaim":
            each["metadata"]["name"] += f"-{name}"
            each["spec"]["resources"]["requests"]["storage"] = "1Gi"
    kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", given=yaml.safe_dump_all(sent))


def _is_queue(obj: Object) -> bool:
    return obj["apiVersion"].split("/")[0] in QUEUES


def test_the_namespace_may_have_another_name(kubeconfig: str, tmp_path: Path) -> None:
    near = os.path.relpath(MANIFESTS, tmp_path.resolve())
    settings = {"namespace": "team-a", "resources": [f"{near}/overlays/eks"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    objects = built(tmp_path)
    assert [each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"] == ["team-a"]
    assert {each["metadata"].get("namespace", "team-a") for each in objects} == {"team-a"}
    (binding,) = [each for each in objects if each["kind"] == "RoleBinding"]
    assert binding["subjects"][0]["namespace"] == "team-a"


def test_a_job_with_a_sidecar_builds_and_the_server_takes_it(overlay: None, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes((SAMPLES / "pytorchjob.yaml").read_bytes())
    near = os.path.relpath(MANIFESTS, tmp_path.resolve())
    image = {"name": "tcpxo-daemon", "newName": "registry.example/tcpxo-daemon", "newTag": "v1"}
    settings = {"resources": ["job.yaml"], "components": [f"{near}/components/gke-tcpxo"], "images": [image]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (job,) = built(tmp_path)
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert pod["initContainers"][0]["image"] == "registry.example/tcpxo-daemon:v1"
    kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", given=yaml.safe_dump(job))


def test_the_server_refuses_a_field_that_is_not_there(overlay: None) -> None:
    quota = next(each for each in built(MANIFESTS / "overlays" / "kind") if each["kind"] == "ResourceQuota")
    quota["spec"]["harder"] = {}
    said = kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", given=yaml.safe_dump(quota), ok=False)
    assert "harder" in said


def test_the_claim_is_bound_and_counts(overlay: None) -> None:
    wait_for("the claim is bound", lambda: get(NAMESPACE, "pvc", "millrace")["status"]["phase"] == "Bound", 60)
    used = wait_for("the quota counts", lambda: get(NAMESPACE, "quota", "millrace").get("status", {}).get("used"), 30)
    assert used["persistentvolumeclaims"] == "1"


def allowed(account: str, asked: list[tuple[str, str, str]]) -> list[bool]:
    """Whether a service account may do each of these: verb, API group, resource."""
    reviews = []
    for verb, group, resource in asked:
        name, _, part = resource.partition("/")
        what = {"namespace": NAMESPACE, "verb": verb, "group": group, "resource": name, "subresource": part}
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
        spec = {"user": account, "groups": groups, "resourceAttributes": what}
        reviews.append({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
    text = kubectl("create", "-f", "-", "-o", "yaml", given=yaml.safe_dump_all(reviews))
    answers = [each for each in yaml.safe_load_all(text) if each]
    (answers,) = [each["items"] if each["kind"] == "List" else answers for each in answers[:1]]
    return [each["status"]["allowed"] for each in answers]


NEEDED = [(verb, rule.group, rule.resource) for rule, verb in rbac.single(rbac.LAUNCHER)]
BEYOND = [
    ("get", "", "secrets"),
    ("create", "", "pods"),
    ("create", "", "pods/exec"),
    ("create", "", "serviceaccounts/token"),
    ("delete", "", "persistentvolumeclaims"),
    ("list", "", "nodes"),
    ("impersonate", "", "users"),
    ("create", "rbac.authorization.k8s.io", "rolebindings"),
]


def test_the_launcher_may_do_what_it_needs_and_nothing_else(overlay: None) -> None:
    found = dict(zip(NEEDED + BEYOND, allowed(LAUNCHER, NEEDED + BEYOND), strict=True))
    assert [each for each in NEEDED if not found[each]] == []
    assert [each for each in BEYOND if found[each]] == []


def test_what_trains_may_do_nothing(overlay: None) -> None:
    assert not any(allowed(TRAINER, NEEDED + BEYOND))


def made(pod: Object) -> str:
    obj = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": NAMESPACE}, "spec": pod}
    return kubectl("create", "--dry-run=server", "-f", "-", given=yaml.safe_dump(obj), ok=False)


def test_the_namespace_takes_our_pods_and_no_others(overlay: None) -> None:
    job = yaml.safe_load((SAMPLES / "data.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    assert "created" in made(pod)
    assert "exceeded quota" in made(_asking(pod, "cpu", "100"))
    root = {**pod, "securityContext": {**pod["securityContext"], "runAsUser": 0}}
    assert 'violates PodSecurity "restricted' in made(root)


def _asking(pod: Object, resource: str, size: str) -> Object:
    (container,) = pod["containers"]
    requests = {**container["resources"]["requests"], resource: size}
    return {**pod, "containers": [{**container, "resources": {**container["resources"], "requests": requests}}]}


def _phases(job: str) -> set[str]:
    return {each["status"]["phase"] for each in get(NAMESPACE, "pods", "-l", f"millrace.dev/job={job}")}


@pytest.mark.timeout(600)
def test_sample_data_and_pytorchjob(dataset: None) -> None:
    run_sample("pytorchjob.yaml")
    ended("pytorchjob", "sample-train", "Succeeded")
    # The operator looks at worker-0 alone.
    wait_for("every pod's success", lambda: _phases("sample-train") == {"Succeeded"}, 60)
    kubectl("-n", NAMESPACE, "delete", "pytorchjob", "sample-train")


@pytest.mark.timeout(600)
def test_sample_trainjob(dataset: None) -> None:
    run_sample("trainjob.yaml")
    ended("trainjob", "sample-trainjob", "Complete")
    kubectl("delete", "-f", str(SAMPLES / "trainjob.yaml"))


@pytest.mark.timeout(600)
def test_sample_experiment(dataset: None) -> None:
    run_sample("experiment.yaml")
    found = ended("experiment", "sample-tune", "Succeeded", 400)
    assert found["status"]["trialsSucceeded"] == 4
    (metric,) = found["status"]["currentOptimalTrial"]["observation"]["metrics"]
    assert metric["name"] == "val_accuracy"
    kubectl("-n", NAMESPACE, "delete", "experiment", "sample-tune")


@pytest.mark.timeout(1200)
def test_sample_cronjob_runs_the_whole_chain_once_for_the_same_data(dataset: None) -> None:
    run_sample("cronjob.yaml")
    for number, wanted in ((1, ("promoted", "refused")), (2, ("nothing new",))):
        name = f"sample-retrain-{number}"
        kubectl("-n", NAMESPACE, "create", "job", "--from=cronjob/sample-retrain", name)
        ended("job", name, "Complete", 900)
        said = kubectl("-n", NAMESPACE, "logs", f"job/{name}")
        assert any(each in said for each in wanted), said[-3000:]
