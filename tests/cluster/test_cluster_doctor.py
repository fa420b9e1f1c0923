"""`millrace doctor --cluster` on a real cluster: it names what is wrong, and the command that it gives really mends it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from components.launch import rbac
from components.launch.api import Api, ApiError
from pipelines import doctor_cluster, doctor_rights, katib_config
from pipelines.cli import main
from pipelines.doctor_look import Look
from tests import kube
from tests.kube import CLAIM, kubectl
from trainer.config.load import load
from trainer.doctor import Finding

pytestmark = pytest.mark.cluster
JOBS = ["cluster.job.train=pytorchjob", "cluster.job.tune=experiment", "tune.pruner=none", f"cluster.claim={CLAIM}"]


@pytest.fixture
def admin(namespace: str, kubeconfig: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test's namespace, looked at by the administrator; its volume is there."""
    kubectl("-n", namespace, "wait", f"pvc/{CLAIM}", "--for=jsonpath={.status.phase}=Bound", "--timeout=50s")
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    return namespace


def look(namespace: str, *overrides: str, system: str = "kubeflow", account: str = "") -> Look:
    return doctor_cluster.examine(load(None, [*JOBS, *overrides]), namespace=namespace, system=system, account=account)


def one(found: Look, word: str, notes: bool = False) -> Finding:
    """The only finding (or note), which has this word in it."""
    listed = found.notes if notes else found.findings
    matching = [each for each in listed if word in each.what]
    assert len(matching) == 1, listed
    assert notes or found.findings == matching
    return matching[0]


def mend(fix: str) -> None:
    """Run what a finding told us to, as the administrator."""
    command = fix[min(fix.index(word) for word in ("kubectl", "echo", "python -m") if word in fix) :]
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def until(found: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Wait until something holds: rights and labels reach the API server's caches a moment later."""
    end = time.monotonic() + deadline_s
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_in_the_shipped_namespace_all_is_well(admin: str, launcher_kubeconfig: Path, monkeypatch, capsys):
    assert look(admin).findings == []
    # As the service account of the launcher, which sees less and may do all that it must.
    monkeypatch.setenv("KUBECONFIG", str(launcher_kubeconfig))
    found = look("")
    assert found.findings == []
    assert found.facts["namespace"] == admin
    assert "list nodes" in one(found, "not looked at", notes=True).what
    monkeypatch.chdir(launcher_kubeconfig.parent)
    (launcher_kubeconfig.parent / "params.yaml").write_text(
        yaml.safe_dump({"cluster": {"job": {"train": "pytorchjob"}, "claim": CLAIM}})
    )
    assert main(["doctor", "--cluster"]) == 0
    assert "the cluster is fit" in capsys.readouterr().out


def test_each_verb_that_the_role_lacks_is_named(namespace: str, api: Api, kubeconfig: str):
    """Runs as the launcher's account, while its Role loses one verb after the other."""
    role = json.loads(kubectl("-n", namespace, "get", "role", rbac.ACCOUNT, "-o", "json"))
    me = f"system:serviceaccount:{namespace}:{rbac.ACCOUNT}"

    def said() -> list[str]:
        found = Look(api, load(None), namespace)
        doctor_rights.check(found)
        return [each.what for each in found.findings]

    assert said() == []
    whole = json.loads(json.dumps(role["rules"]))
    tried = 0
    for index, rule in enumerate(whole):
        resource = ".".join(filter(None, (rule["resources"][0], rule["apiGroups"][0])))
        for verb in rule["verbs"]:
            role["rules"] = [dict(each) for each in whole]
            left = [each for each in rule["verbs"] if each != verb]
            role["rules"][index : index + 1] = [{**rule, "verbs": left}] if left else []
            replace(role)
            wanted = [f"{me} may not {verb} {resource} in namespace {namespace}"]
            until(lambda wanted=wanted: said() == wanted, str(wanted))
            tried += 1
    assert tried == len(list(rbac.single(rbac.LAUNCHER)))


def replace(role: kube.Object) -> None:
    patch = json.dumps([{"op": "replace", "path": "/rules", "value": role["rules"]}])
    name, place = role["metadata"]["name"], role["metadata"]["namespace"]
    kubectl("-n", place, "patch", "role", name, "--type=json", "-p", patch)


def test_missing_rights_are_given_by_the_command(admin: str):
    rules = [
        each for each in rbac.manifest(rbac.LAUNCHER)["rules"] if each["resources"] not in (["events"], ["pods/log"])
    ]
    rules[0]["verbs"].remove("delete")
    replace({"metadata": {"name": rbac.ACCOUNT, "namespace": admin}, "rules": rules})
    found: list[Look] = []

    def lacks(number: int) -> bool:
        found.append(look(admin))
        return len(found[-1].findings) == number

    until(lambda: lacks(3), "three lines lack verbs")
    assert {each.what.split(" may not ")[1].split(" in ")[0] for each in found[-1].findings} == {
        "delete pytorchjobs.kubeflow.org", "get, list, watch events", "get pods/log",
    }  # fmt: skip
    for each in found[-1].findings:
        mend(each.fix)
    until(lambda: lacks(0), "the rights are there")


def test_an_account_without_any_right_gets_all_by_one_command(admin: str):
    kubectl("-n", admin, "delete", "rolebinding,role,serviceaccount", rbac.ACCOUNT)
    until(lambda: len(look(admin).findings) == 1, "no rights at all")
    mend(one(look(admin), "has no rights").fix.partition("for this one: ")[2])
    until(lambda: look(admin).findings == [], "the rights are there")


def test_labels_of_the_namespace(admin: str):
    labels = ("pod-security.kubernetes.io/enforce", "katib.kubeflow.org/metrics-collector-injection")
    kubectl("label", "namespace", admin, *(f"{each}-" for each in labels))
    found = look(admin)
    mend(one(found, labels[1]).fix)
    mend(one(found, "enforces no Pod Security policy", notes=True).fix)
    found = look(admin)
    assert (found.findings, found.notes, found.facts["policy"]) == ([], [], "restricted")


def test_what_a_restricted_namespace_would_refuse(admin: str):
    assert "master: false" in one(look(admin, "cluster.job.master=true"), "cluster.job.master cannot work").fix
    assert (
        "cluster.job.tune: pod"
        in one(look(admin, "tune.pruner=median"), "tune.pruner median is left out", notes=True).fix
    )


def test_katib_as_upstream_ships_it_is_mended_by_the_command(admin: str):
    """A copy of its configuration in the test's namespace: the cluster's own is everybody's."""
    given = json.loads(kubectl("-n", "kubeflow", "get", "configmap", katib_config.CONFIG_MAP, "-o", "json"))
    config = katib_config.settings(given)
    config["init"]["controller"].pop("injectSecurityContext", None)
    for each in config["runtime"]["suggestions"]:
        each.pop("securityContext", None)
    meta = {"name": katib_config.CONFIG_MAP, "namespace": admin}
    data = {katib_config.KEY: yaml.safe_dump(config)}
    kube.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    found = look(admin, system=admin)
    assert [each.what.split()[1] for each in found.findings] == ["tpe", "init.controller.injectSecurityContext"]
    command, _, restart = found.findings[0].fix.partition(" && ")
    assert restart == f"kubectl rollout restart deployment katib-controller -n {admin}"
    mend(command)
    assert look(admin, system=admin).findings == []


def test_a_claim_that_is_missing_is_made_by_the_command(admin: str):
    finding = one(look(admin, "cluster.claim=other"), "claim other (cluster.claim) does not exist")
    mend(finding.fix)
    until(lambda: look(admin, "cluster.claim=other").findings == [], "the claim is bound", 60)
    assert look(admin, "cluster.claim=other").facts["claim"] == {"phase": "Bound", "modes": ["ReadWriteMany"]}


def test_a_claim_that_stays_pending_is_explained(admin: str):
    spec = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "no-such",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    meta = {"name": "waits", "namespace": admin}
    kube.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec})
    until(
        lambda: "no-such" in one(look(admin, "cluster.claim=waits"), "claim waits is Pending").what,
        "the event is there",
    )
    mend(one(look(admin, "cluster.claim=waits"), "claim waits is Pending").fix)
    until(lambda: look(admin, "cluster.claim=waits").findings == [], "the claim is bound", 60)


def test_names_that_do_not_exist(admin: str, cleaned: list[str]):
    name = f"{admin}-urgent"
    cleaned.append(f"priorityclass/{name}")
    words = [f"cluster.job.priority_class={name}"]
    mend(one(look(admin, *words), f"priority class {name}").fix)
    assert look(admin, *words).findings == []
    mend(one(look(admin, "cluster.job.service_account=robot"), "service account robot").fix)
    assert look(admin, "cluster.job.service_account=robot").findings == []


@pytest.fixture
def cleaned() -> Iterator[list[str]]:
    """Objects of the whole cluster that the test made."""
    names: list[str] = []
    yield names
    for name in names:
        kubectl("delete", name, "--ignore-not-found")


def test_queues_of_what_is_not_installed(admin: str):
    installed = kubectl("api-versions")
    for scheduler, group in (("kueue", "kueue.x-k8s.io"), ("volcano", "scheduling.volcano.sh")):
        found = look(admin, f"cluster.job.scheduler={scheduler}", "cluster.job.queue=no-such-queue")
        word = "no-such-queue" if group in installed else f"no {scheduler.title()}"
        assert one(found, word).fix


def test_more_than_the_nodes_have(admin: str):
    words = ["cluster.gpus_per_node=64", "cluster.resources={train: {memory: 900Ti}}"]
    gpus, memory = sorted((each.what for each in look(admin, *words).findings), key=lambda text: "memory" in text)
    assert "nvidia.com/gpu of 64" in gpus
    assert "memory of 921600.0Gi" in memory
    assert (
        "zone=none-such" in one(look(admin, "cluster.job.node_selector={zone: none-such}"), "nodes takes the pods").what
    )


def test_a_quota_that_is_too_small(admin: str):
    meta = {"name": "small", "namespace": admin}
    hard = {"requests.memory": "1Gi", "limits.cpu": "100"}
    kube.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": {"hard": hard}})
    until(lambda: len(look(admin).findings) == 2, "the quota is counted")
    assert refused(admin).status == 403
    for each in look(admin).findings:
        mend(each.fix)
    until(lambda: look(admin).findings == [], "the quota is larger")
    assert refused(admin) is None


def refused(namespace: str) -> ApiError | None:
    """What the cluster says to a pod as millrace makes it; None if it takes it."""
    found = Look(Api.connect(namespace), load(None, JOBS), namespace)
    from components.launch import pods

    template = pods.pod_template(found.job(), "pytorch")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", **template.get("metadata", {})},
        "spec": template["spec"],
    }
    try:
        found.api.create(pod, dry_run=True)
    except ApiError as error:
        return error
    return None


def test_what_the_account_may_not_see_is_shown_after_the_command(
    namespace: str, launcher_kubeconfig: Path, kubeconfig: str, cleaned: list[str], monkeypatch
):
    monkeypatch.setenv("KUBECONFIG", str(launcher_kubeconfig))
    fix = one(look(""), "not looked at", notes=True).fix
    # A name of the test's own: the whole cluster has one millrace-doctor.
    cleaned += [f"clusterrole/{namespace}", f"clusterrolebinding/{namespace}"]
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    mend(fix.replace("millrace-doctor", namespace))
    monkeypatch.setenv("KUBECONFIG", str(launcher_kubeconfig))
    until(lambda: look("").notes == [], "all is seen")
    assert look("").facts["nodes"]


def test_a_server_with_another_certificate_is_not_talked_to(launcher_kubeconfig: Path, tmp_path: Path, monkeypatch):
    """The kubeconfig's authority is replaced by one that did not sign the server's certificate."""
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other", "-days", "1"]
    subprocess.run([*made, "-keyout", tmp_path / "key", "-out", tmp_path / "ca"], check=True, capture_output=True)
    content = json.loads(launcher_kubeconfig.read_text())
    content["clusters"][0]["cluster"].pop("certificate-authority-data")
    content["clusters"][0]["cluster"]["certificate-authority"] = str(tmp_path / "ca")
    launcher_kubeconfig.write_text(json.dumps(content))
    monkeypatch.setenv("KUBECONFIG", str(launcher_kubeconfig))
    with pytest.raises(ApiError, match="not trusted"):
        look("")
