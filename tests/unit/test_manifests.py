"""The files of manifests/, without a cluster: their shapes, what they name of each other, and that the code still makes them.

What takes kubectl or an API server is in tests/cluster/test_cluster_manifests.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from components.launch import chain_plan, pytorchjob, rbac, spec, validate
from components.launch.security import pod_specs, restricted
from trainer import storage
from trainer.config import Params
from trainer.config.load import load

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
KUBERNETES = "1.33"
CLOUDS = ("aks", "eks", "gke")
FRAGMENTS = sorted(MANIFESTS.glob("overlays/*/params*.yaml"))
PATCHES = {MANIFESTS / "components" / "gke-tcpxo" / "daemon.yaml"}
# Not objects: settings of kustomize, patches, and parts of a params.yaml.
OTHER = {"kustomization.yaml", *(path.name for path in FRAGMENTS), "params.yaml"}
FILES = sorted(path for path in MANIFESTS.rglob("*.yaml") if path.name not in OTHER and path not in PATCHES)
# The longest that SIGTERM can come before the end of a spot node, in seconds.
NOTICE_S = {"eks": 120, "gke": 15, "aks": 30}
OURS = ("kubeflow.org", "trainer.kubeflow.org")


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


OBJECTS = [(path, obj) for path in FILES for obj in documents(path)]
NAMES = [f"{path.relative_to(MANIFESTS)}:{obj['kind']}/{obj['metadata']['name']}" for path, obj in OBJECTS]


def objects(kind: str, folder: str = "") -> list[dict[str, Any]]:
    return [obj for path, obj in OBJECTS if obj["kind"] == kind and path.is_relative_to(MANIFESTS / folder)]


def only(kind: str, folder: str, name: str = "millrace") -> dict[str, Any]:
    (found,) = [obj for obj in objects(kind, folder) if obj["metadata"]["name"] == name]
    return found


def closed(**properties: Any) -> dict[str, Any]:
    """The JSON schema of an object with these properties and no others, all of them required."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


WORD, SWITCH, COUNT = {"type": "string", "minLength": 1}, {"type": "boolean"}, {"type": "integer", "minimum": 1}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"}
LISTED = {"type": "array", "minItems": 1}
_QUOTA = closed(name=WORD, nominalQuota=QUANTITY)
_GROUP = closed(
    coveredResources={**LISTED, "items": WORD},
    flavors={**LISTED, "items": closed(name=WORD, resources={**LISTED, "items": _QUOTA})},
)
# What we use of them, as Kueue 0.14 and Volcano 1.12 define it.
QUEUES: dict[str, dict[str, Any]] = {
    "kueue.x-k8s.io/v1beta1 ResourceFlavor": {},
    "kueue.x-k8s.io/v1beta1 ClusterQueue": closed(
        namespaceSelector=closed(matchLabels={"type": "object"}),
        queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        preemption=closed(withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}),
        resourceGroups={**LISTED, "items": _GROUP},
    ),
    "kueue.x-k8s.io/v1beta1 LocalQueue": closed(clusterQueue=WORD),
    "scheduling.volcano.sh/v1beta1 Queue": closed(
        weight=COUNT, reclaimable=SWITCH, capability={"type": "object", "additionalProperties": QUANTITY}
    ),
}


def check(obj: dict[str, Any]) -> None:
    """Strictly: a field that the kind does not have is wrong."""
    kind = f"{obj['apiVersion']} {obj['kind']}"
    if kind in QUEUES:
        if QUEUES[kind]:
            jsonschema.validate(obj.get("spec"), QUEUES[kind])
        assert set(obj) <= {"apiVersion", "kind", "metadata", "spec"}
    elif obj["apiVersion"].split("/")[0] in OURS:
        validate.check([obj])
    else:
        kubernetes_validate.validate(obj, KUBERNETES, strict=True)


@pytest.mark.parametrize(("path", "obj"), OBJECTS, ids=NAMES)
def test_every_object_has_the_shape_of_its_kind(path: Path, obj: dict[str, Any]) -> None:
    check(obj)


def test_a_field_too_many_is_seen() -> None:
    queue = documents(MANIFESTS / "components/volcano/queue.yaml")[0]
    queue["spec"]["wieght"] = 1
    with pytest.raises(jsonschema.ValidationError, match="wieght"):
        check(queue)


def test_every_file_is_used() -> None:
    used: set[Path] = set()
    for path in MANIFESTS.rglob("kustomization.yaml"):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        patches = [each["path"] for each in settings.get("patches", ()) if "path" in each]
        for name in (*settings.get("resources", ()), *settings.get("components", ()), *patches):
            found = (path.parent / name).resolve()
            assert found.exists(), f"{path}: {name}"
            used.add(found)
    samples = set((MANIFESTS / "samples").iterdir())
    assert {*FILES, *PATCHES} - samples == {path for path in used if path.is_file()}


@pytest.mark.parametrize(("path", "obj"), OBJECTS, ids=NAMES)
def test_every_pod_passes_the_policy_restricted(path: Path, obj: dict[str, Any]) -> None:
    for pod in pod_specs(obj):
        assert restricted(pod) == []


def test_the_namespace_enforces_it_and_lets_katib_in() -> None:
    labels = only("Namespace", "base")["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}
    assert labels["katib.kubeflow.org/metrics-collector-injection"] == "enabled"


def test_what_trains_has_no_rights_and_no_token() -> None:
    assert only("ServiceAccount", "base")["automountServiceAccountToken"] is False
    bound = [subject["name"] for binding in objects("RoleBinding") for subject in binding["subjects"]]
    assert bound == [rbac.ACCOUNT]
    assert not objects("ClusterRoleBinding")


def test_no_role_is_wider_than_the_code_needs() -> None:
    roles = {role["metadata"]["name"]: role["rules"] for kind in ("Role", "ClusterRole") for role in objects(kind)}
    wanted = {rbac.ACCOUNT: rbac.LAUNCHER, "millrace-user": rbac.PERSON, "millrace-doctor": rbac.DOCTOR}
    assert roles == {name: rbac.manifest(role)["rules"] for name, role in wanted.items()}
    for rule in (rule for rules in roles.values() for rule in rules):
        assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
        assert "secrets" not in rule["resources"]


def test_samples_and_rights_are_what_the_code_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import manifests
    from pipelines.golden import changes

    monkeypatch.chdir(ROOT)
    assert changes(manifests.render(), manifests.FOLDER) == [], "run `python -m pipelines.manifests`"


def bytes_of(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]
    scale = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * scale[unit]


def quota(overlay: str) -> dict[str, str]:
    hard = dict(only("ResourceQuota", "base")["spec"]["hard"])
    settings = yaml.safe_load((MANIFESTS / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8"))
    for patch in settings.get("patches", ()):
        if patch["target"]["kind"] == "ResourceQuota":
            for step in yaml.safe_load(patch["patch"]):
                hard[step["path"].removeprefix("/spec/hard/")] = step["value"]
    return hard


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_parameters_of_an_overlay_fit_it(path: Path) -> None:
    params = load(path)
    made = pytorchjob.pytorchjob(spec.training(params, name="x", args=("train",)))
    validate.check([made])
    worker = made["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod, count = worker["template"]["spec"], worker["replicas"]
    (requests,) = [container["resources"]["requests"] for container in pod["containers"]]
    hard = quota(path.parent.name)
    for name in ("cpu", "memory", *({"nvidia.com/gpu"} & set(requests))):
        assert count * bytes_of(requests[name]) <= bytes_of(hard[f"requests.{name}"]), name
    assert pod["serviceAccountName"] == only("ServiceAccount", "base")["metadata"]["name"]
    assert pod["priorityClassName"] in {each["metadata"]["name"] for each in objects("PriorityClass", "base")}
    assert params.cluster.claim == only("PersistentVolumeClaim", "base")["metadata"]["name"]
    assert restricted(pod) == []


def test_samples_run_with_what_the_small_overlay_says() -> None:
    trees = [
        yaml.safe_load((MANIFESTS / name / "params.yaml").read_text(encoding="utf-8"))["cluster"]
        for name in ("samples", "overlays/kind")
    ]
    assert trees[0].pop("store").startswith(Params().cluster.mount)
    assert trees[0] == trees[1]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_spot_pods_are_asked_to_end_before_the_node_does(cloud: str) -> None:
    params = load(MANIFESTS / "overlays" / cloud / "params-spot.yaml")
    assert params.cluster.job.grace_s <= NOTICE_S[cloud]
    assert params.cluster.job.restarts > Params().cluster.job.restarts
    assert any(each.value in ("spot", "true") for each in params.cluster.job.tolerations)


@pytest.mark.parametrize("path", [path for path in FRAGMENTS if path.parent.name in CLOUDS], ids=str)
def test_the_store_of_a_cloud_is_one_that_all_pods_reach(path: Path) -> None:
    params = load(path)
    store = chain_plan.store(params)
    assert storage.is_remote(store)
    assert store.partition("://")[0] == {"eks": "s3", "gke": "gs", "aks": "abfs"}[path.parent.name]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_setting_of_a_cloud_is_used_and_every_place_is_set(cloud: str) -> None:
    folder = MANIFESTS / "overlays" / cloud
    lines = (folder / "settings.env").read_text(encoding="utf-8").splitlines()
    given = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    used = {each["source"]["fieldPath"].removeprefix("data.") for each in settings["replacements"]}
    assert given == used
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.yaml"))
    targets = [path for each in settings["replacements"] for target in each["targets"] for path in target["fieldPaths"]]
    assert text.count(": set-by-settings.env") == len(targets)


def test_queues_give_out_what_the_quota_lets_in() -> None:
    hard = only("ResourceQuota", "base")["spec"]["hard"]
    wanted = {name.removeprefix("requests."): size for name, size in hard.items() if name.startswith("requests.")}
    wanted.pop("storage")
    (group,) = only("ClusterQueue", "components")["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert {each["name"]: each["nominalQuota"] for each in flavor["resources"]} == wanted
    assert only("Queue", "components")["spec"]["capability"] == wanted
