"""`millrace doctor --cluster` against a real HTTP server that plays clusters with one thing wrong each.

What the fixes do, and that a real API server words things so, is in tests/cluster/test_cluster_doctor.py.
"""

import copy
import json

import pytest
import yaml

from components.launch import rbac
from components.launch.kinds import KINDS
from pipelines import doctor_cluster, katib_config, rights
from pipelines.cli import main
from tests.api_server import ApiServer, refuses, sends
from trainer.config.load import load
from trainer.errors import MillraceError

# As Kubeflow Pipelines 2.17.0 ships it, and as somebody may have changed it.
DEFAULTS = """
spec:
  ttlStrategy: {secondsAfterCompletion: 3600}
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: %s
"""
POLICIES = {
    "OnError": True, "OnTransientError": True, "Always": False, "OnFailure": False,
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_that_ignores_failing_commands_is_noted(policy):
    note = doctor_cluster.retry_note({"workflowDefaults": DEFAULTS % policy}, "kubeflow")
    assert (note is not None) == POLICIES[policy]
    if note:
        assert policy in note.what
        assert "set_retry" in note.what
        assert "-n kubeflow" in note.fix


@pytest.mark.parametrize("text", [None, "", "spec: {}", "spec:\n", "spec: [1]", "a: [", "3"])
def test_other_defaults_are_no_note(text):
    assert doctor_cluster.retry_note({} if text is None else {"workflowDefaults": text}, "kubeflow") is None


GIVEN = katib_config.context()
KATIB = {
    "init": {"controller": {"injectSecurityContext": True}},
    "runtime": {
        "suggestions": [{"algorithmName": name, "securityContext": GIVEN} for name in ("tpe", "random")],
        "earlyStoppings": [{"algorithmName": "medianstop"}],
    },
}
PARAMS = [
    "cluster.job.train=pytorchjob", "cluster.job.tune=experiment", "cluster.job.nodes=2", "cluster.gpus_per_node=1",
    "cluster.job.priority_class=urgent", "cluster.job.service_account=trains", "cluster.job.scheduler=kueue",
    "cluster.job.queue=team", "cluster.claim=shared", "tune.pruner=none",
]  # fmt: skip


def deployment(name, place):
    return {"metadata": {"name": name, "namespace": place}, "spec": {"replicas": 1}, "status": {"availableReplicas": 1}}


def node(name):
    most = {"cpu": "8", "memory": "32Gi", "pods": "110", "nvidia.com/gpu": "1"}
    status = {
        "allocatable": most, "nodeInfo": {"kubeletVersion": "v1.33.1"},
        "conditions": [{"type": "Ready", "status": "True"}],
    }  # fmt: skip
    return {"metadata": {"name": name, "labels": {"zone": "a"}}, "spec": {}, "status": status}


class Cluster:
    """A cluster in which all is well: path -> object; and who may do what."""

    def __init__(self):
        mine = "/api/v1/namespaces/mine"
        labels = {
            "pod-security.kubernetes.io/enforce": "restricted",
            "katib.kubeflow.org/metrics-collector-injection": "enabled",
        }
        self.at = {
            "/version": {"gitVersion": "v1.33.4"},
            "/apis": {"groups": [{"name": "kueue.x-k8s.io", "preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}}]},
            "/apis/kubeflow.org": {
                "versions": [{"groupVersion": "kubeflow.org/v1"}, {"groupVersion": "kubeflow.org/v1beta1"}]
            },
            "/apis/kubeflow.org/v1": {"resources": [{"name": "pytorchjobs"}, {"name": "pytorchjobs/status"}]},
            "/apis/kubeflow.org/v1beta1": {"resources": [{"name": "experiments"}]},
            "/api/v1/namespaces/mine": {"metadata": {"labels": labels}},
            "/api/v1/nodes": {"items": [node("one"), node("two")]},
            "/apis/apps/v1/deployments": {
                "items": [
                    deployment("training-operator", "kubeflow"), deployment("katib-controller", "kubeflow"),
                    deployment("coredns", "kube-system"),
                ]
            },
            "/api/v1/namespaces/kubeflow/configmaps/katib-config": {
                "metadata": {"name": "katib-config", "namespace": "kubeflow"},
                "data": {"katib-config.yaml": yaml.safe_dump(KATIB)},
            },
            "/apis/storage.k8s.io/v1/storageclasses": {
                "items": [{"metadata": {"name": "files"}, "provisioner": "efs.csi.aws.com"}]
            },
            f"{mine}/persistentvolumeclaims/shared": {
                "metadata": {"name": "shared"}, "spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}
            },
            f"{mine}/resourcequotas": {"items": []},
            f"{mine}/limitranges": {"items": []},
            f"{mine}/serviceaccounts/trains": {"metadata": {}},
            f"{mine}/events": {"items": []},
            "/apis/scheduling.k8s.io/v1/priorityclasses/urgent": {"metadata": {}},
            "/apis/kueue.x-k8s.io/v1beta2/namespaces/mine/localqueues/team": {"metadata": {}},
        }  # fmt: skip
        self.forbidden = set()  # paths
        self.denied = set()  # (who, verb, resource)
        self.me = "anna"
        self.mine = "mine"
        self.refusals = {}  # kind -> answer to a rehearsal
        self.rehearsed = []

    def answer(self, asked):
        if asked.path in self.forbidden:
            return refuses(403, "Forbidden", "pods is forbidden")
        if asked.method == "GET":
            found = self.at.get(asked.path)
            return refuses(404, "NotFound") if found is None else sends(200, found)
        kind = asked.body["kind"]
        if kind == "SelfSubjectReview":
            return sends(201, {"status": {"userInfo": {"username": self.me}}})
        if kind.endswith("AccessReview"):
            spec = asked.body["spec"]
            where = spec["resourceAttributes"]
            assert where["namespace"] == self.mine
            resource = where["resource"] + (f"/{where['subresource']}" if where["subresource"] else "")
            return sends(
                201, {"status": {"allowed": (spec.get("user", ""), where["verb"], resource) not in self.denied}}
            )
        assert asked.query["dryRun"] == "All"
        self.rehearsed.append(kind)
        return self.refusals.get(kind, sends(201, asked.body))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    found = Cluster()
    with ApiServer(usual=found.answer) as server:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {"token": "canary-token"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "mine"}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.chdir(tmp_path)
        found.server = server
        yield found


def look(*overrides, **where):
    return doctor_cluster.examine(load(None, [*PARAMS, *overrides]), **where)


def test_a_cluster_in_which_all_is_well(cluster):
    found = look()
    assert (found.findings, found.notes, found.unseen) == ([], [], [])
    assert found.facts["kinds"] == {
        "pytorchjobs": "kubeflow.org/v1",
        "trainjobs": "",
        "experiments": "kubeflow.org/v1beta1",
    }
    assert found.facts["namespace"] == "mine"
    assert cluster.rehearsed == ["PyTorchJob", "Experiment"]
    assert {each.method for each in cluster.server.asked} == {"GET", "POST"}


def drop(*paths):
    def change(cluster):
        for path in paths:
            del cluster.at[path]

    return change


def edit(path, change):
    return lambda cluster: change(cluster.at[path])


def katib(change):
    def apply(cluster):
        config = copy.deepcopy(KATIB)
        change(config)
        cluster.at[CONFIG]["data"]["katib-config.yaml"] = yaml.safe_dump(config)

    return apply


def each_node(change):
    return edit("/api/v1/nodes", lambda found: [change(item) for item in found["items"]])


def quota(hard, used):
    item = {"metadata": {"name": "most"}, "status": {"hard": hard, "used": used}}
    return edit("/api/v1/namespaces/mine/resourcequotas", lambda found: found["items"].append(item))


def unready(index):
    return edit("/apis/apps/v1/deployments", lambda found: found["items"][index]["status"].clear())


MINE = "/api/v1/namespaces/mine"
CONFIG = "/api/v1/namespaces/kubeflow/configmaps/katib-config"
CLAIM = f"{MINE}/persistentvolumeclaims/shared"
QUEUE = "/apis/kueue.x-k8s.io/v1beta2/namespaces/mine/localqueues/team"
TAINT = [{"key": "nvidia.com/gpu", "value": "yes", "effect": "NoSchedule"}]
# What is wrong; params.yaml; a word of the finding; a word of its fix.
WRONG = {
    "no-operator": (drop("/apis/kubeflow.org/v1"), [], "no PyTorchJob of kubeflow.org/v1", "kubectl apply --server-side"),
    "other-version": (
        edit("/apis/kubeflow.org/v1beta1", lambda found: found["resources"].append({"name": "pytorchjobs"})),
        ["cluster.job.train=trainjob"], "no TrainJob of trainer.kubeflow.org/v1alpha1", "trainer.git",
    ),
    "operator-down": (unready(0), [], "training-operator in namespace kubeflow has no pod", "rollout restart"),
    "names-down": (unready(2), [], "no pod of coredns is ready", "rollout restart"),
    "old-server": (edit("/version", lambda found: found.update(gitVersion="v1.25.9+k3s1")), [], "older than 1.26", "upgrade"),
    "new-kubelet": (
        each_node(lambda item: item["status"]["nodeInfo"].update(kubeletVersion="v1.34.0")), [], "kubelet v1.34.0", "cordon one",
    ),
    "no-gpus": (each_node(lambda item: item["status"]["allocatable"].pop("nvidia.com/gpu")), [], "nvidia.com/gpu of 1",
                "device plugin"),
    "64-gpus": (None, ["cluster.gpus_per_node=64"], "nvidia.com/gpu of 64", "cluster.gpus_per_node"),
    "rdma": (None, ["cluster.job.devices={rdma/hca: 1}"], "rdma/hca", "cluster.job.devices.rdma/hca"),
    "memory": (None, ["cluster.resources={train: {memory: 64Gi}}"], "memory of 64.0Gi", "cluster.resources.train.memory"),
    "too-many": (None, ["cluster.job.nodes=3"], "is 3 pods (cluster.job.nodes), and 2 of them fit", "cluster.job.nodes: 2"),
    "selector": (None, ["cluster.job.node_selector={zone: b}"], "asks for zone=b", "node_selector"),
    "taint": (each_node(lambda item: item["spec"].update(taints=TAINT)), [], "none of the 2 nodes", "tolerations"),
    "unready": (each_node(lambda item: item["status"].pop("conditions")), [], "none of the 2 nodes", "get nodes"),
    "no-namespace": (drop(MINE), [], "namespace mine does not exist", "kubectl create namespace mine"),
    "no-injection": (edit(MINE, lambda found: found["metadata"].pop("labels")), [], "metrics-collector-injection=enabled",
                     "kubectl label --overwrite namespace mine katib"),
    "master": (None, ["cluster.job.master=true"], "cluster.job.master cannot work", "master: false"),
    "bare-suggestion": (katib(lambda found: found["runtime"]["suggestions"][0].pop("securityContext")), [],
                        "Katib's tpe has no restricted securityContext", "pipelines.katib_config --namespace kubeflow"),
    "bare-collector": (katib(lambda found: found.pop("init")), [], "injectSecurityContext is not true", "rollout restart"),
    "no-algorithm": (None, ["tune.sampler=gp"], "no algorithm bayesianoptimization", "tpe, random, medianstop"),
    "no-place": (None, ["cluster.claim="], "neither cluster.store nor cluster.claim", "PersistentVolumeClaim"),
    "no-claim": (drop(CLAIM), [], "claim shared (cluster.claim) does not exist", '"storageClassName":"files"'),
    "alone": (edit(CLAIM, lambda found: found["spec"].update(accessModes=["ReadWriteOnce"])), [], "not ReadWriteMany",
              "shared-shared"),
    "pending": (
        edit(CLAIM, lambda found: (found["spec"].update(storageClassName="lost"), found["status"].update(phase="Pending"))), [],
        "its class lost does not exist", "kubectl delete pvc shared -n mine && echo",
    ),
    "no-class": (None, ["cluster.job.priority_class=none-such"], "priority class none-such", "kubectl create priorityclass"),
    "no-account": (drop(f"{MINE}/serviceaccounts/trains"), [], "service account trains", "kubectl create serviceaccount"),
    "no-queue": (drop(QUEUE), [], "LocalQueue team", '"apiVersion":"kueue.x-k8s.io/v1beta2"'),
    "shut-queue": (
        edit(QUEUE, lambda found: found.update(
            status={"conditions": [{"type": "Active", "status": "False", "message": "no ClusterQueue"}]})),
        [], "not active: no ClusterQueue", "describe localqueue",
    ),
    "no-kueue": (edit("/apis", lambda found: found["groups"].clear()), [], "no Kueue", "scheduler: default"),
    "no-volcano": (None, ["cluster.job.scheduler=volcano"], "no Volcano", "scheduler: default"),
    "small-quota": (quota({"requests.nvidia.com/gpu": "1"}, {}), [], "asks for 2", "kubectl patch resourcequota most"),
    "limits": (quota({"limits.cpu": "100"}, {}), [], "no LimitRange", '"kind":"LimitRange"'),
    "no-store": (None, ["cluster.store=nosuch://bucket/runs"], "the store cannot be used", "s3://"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_the_one_finding_with_its_fix(name, cluster):
    change, overrides, what, fix = WRONG[name]
    if change:
        change(cluster)
    found = look(*overrides)
    matching = [each for each in found.findings if what in each.what]
    assert len(matching) == 1, found.findings
    assert fix in matching[0].fix
    assert matching[0].why
    # Without an operator or a namespace, other things cannot be right either.
    if name not in ("no-namespace", "no-operator", "no-class", "no-algorithm", "old-server"):
        assert found.findings == matching


def test_early_stopping_that_restricted_refuses_is_a_note(cluster):
    found = look("tune.pruner=median")
    assert found.findings == []
    assert [each.what.split(" in ")[0] for each in found.notes] == ["tune.pruner median is left out"]


def test_a_verb_that_is_missing_is_named_and_one_command_gives_all_that_are_alike(cluster):
    cluster.me = "system:serviceaccount:mine:starts"
    cluster.denied = {("", "watch", "pods"), ("", "watch", "events"), ("", "get", "pods/log")}
    first, second = look().findings
    assert first.what == "system:serviceaccount:mine:starts may not watch pods, events in namespace mine"
    assert "--verb=watch --resource=pods,events" in first.fix
    assert "--serviceaccount=mine:starts" in first.fix
    assert "may not get pods/log" in second.what
    reviews = {
        (each.body["spec"]["resourceAttributes"]["verb"], each.body["spec"]["resourceAttributes"]["resource"])
        for each in cluster.server.asked
        if each.body and each.body["kind"] == "SelfSubjectAccessReview"
    }
    wanted = {(verb, rule.resource.partition("/")[0]) for rule, verb in rbac.single(rbac.LAUNCHER, ("trainjobs",))}
    assert reviews == wanted


def test_a_person_is_told_of_the_launchers_account_as_well(cluster):
    account = "system:serviceaccount:mine:millrace-launcher"
    cluster.denied = {(account, "delete", "pytorchjobs"), ("", "create", "jobs")}
    mine, theirs = look().findings
    assert mine.what == "anna may not create jobs.batch in namespace mine"
    assert "--user=anna" in mine.fix
    assert theirs.what == f"{account} may not delete pytorchjobs.kubeflow.org in namespace mine"
    # Kubeflow Pipelines has rights of its own: nothing is wrong where its steps do all the work.
    found = doctor_cluster.examine(load(None))
    assert found.findings == []
    assert len(found.notes) == 2


def test_without_any_right_one_command_gives_all(cluster, capsys):
    account = "system:serviceaccount:mine:millrace-launcher"
    cluster.denied = {(account, verb, rule.resource) for rule, verb in rbac.single(rbac.LAUNCHER)}
    (finding,) = look().findings
    assert rights.main(finding.fix.split("pipelines.rights ")[1].split(" |")[0].split()) == 0
    made = list(yaml.safe_load_all(capsys.readouterr().out))
    assert made[0]["rules"] == rbac.manifest(rbac.LAUNCHER)["rules"]
    assert [each["kind"] for each in made] == ["Role", "ServiceAccount", "RoleBinding"]


def test_what_we_may_not_see_is_one_note_and_nothing_else(cluster):
    cluster.me = "system:serviceaccount:mine:starts"
    cluster.forbidden = {
        path for path in cluster.at if path not in ("/version",) and not path.startswith("/apis/kubeflow")
    }
    cluster.forbidden |= {"/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"}
    found = look("cluster.job.scheduler=default", "cluster.job.queue=")
    assert found.findings == []
    (note,) = found.notes
    assert "list nodes" in note.what
    assert "get namespaces" in note.what
    assert "--resource=" in note.fix


def test_what_stops_nothing_is_a_note(cluster):
    edit(MINE, lambda found: found["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"))(cluster)
    quota({"requests.nvidia.com/gpu": "2"}, {"requests.nvidia.com/gpu": "1"})(cluster)
    edit("/apis/apps/v1/deployments", lambda found: found["items"].pop(0))(cluster)
    edit(CLAIM, lambda found: found["status"].update(phase="Pending"))(cluster)
    found = look()
    assert found.findings == []
    assert [" ".join(note.what.split()[:2]) for note in found.notes] == [
        "namespace mine", "no deployment", "claim shared", "quota most",
    ]  # fmt: skip


REFUSALS = {
    "webhook": (
        refuses(400, "BadRequest", 'admission webhook "v.kubeflow.org" denied the request: no'),
        "denied the request",
    ),
    "quota": (refuses(403, "Forbidden", "exceeded quota: most"), "exceeded quota"),
    "down": (refuses(400, "InternalError", "failed calling webhook: connection refused"), "failed calling webhook"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_rehearsal_that_is_refused_is_a_finding(name, cluster):
    cluster.refusals["PyTorchJob"], word = REFUSALS[name]
    (finding,) = look().findings
    assert finding.what.startswith("PyTorchJob, as a rehearsal")
    assert word in finding.what


def test_the_label_that_katib_demands_is_told_of_once_and_even_if_we_cannot_see_it(cluster):
    message = 'the namespace lacks label "katib.kubeflow.org/metrics-collector-injection: enabled"'
    cluster.refusals["Experiment"] = refuses(400, "BadRequest", message)
    edit(MINE, lambda found: found["metadata"].pop("labels"))(cluster)
    (seen,) = look().findings
    cluster.forbidden = {MINE}
    (unseen,) = look().findings
    assert seen == unseen
    assert "kubectl label" in seen.fix


def test_a_rehearsal_that_we_may_not_hold_is_none(cluster):
    message = 'pytorchjobs.kubeflow.org is forbidden: User "anna" cannot create resource "pytorchjobs" in API group'
    cluster.refusals["PyTorchJob"] = refuses(403, "Forbidden", message)
    assert look().findings == []


def test_a_store_that_works_is_left_as_it_was(cluster):
    import fsspec

    assert look("cluster.store=memory://bucket/runs").facts["store"] == "memory://bucket/runs"
    assert fsspec.filesystem("memory").find("/bucket") == []


def test_one_question_without_answer_does_not_stop_the_others(cluster):
    cluster.at["/apis/storage.k8s.io/v1/storageclasses"] = []
    cluster.at["/apis/scheduling.k8s.io/v1/priorityclasses/urgent"] = None
    found = look()
    assert any("priority class urgent" in each.what for each in found.findings)


# The command


def test_the_screen_shows_it_all_but_the_token(cluster, capsys):
    cluster.at[f"{CONFIG.rpartition('/')[0]}/workflow-controller-configmap"] = {
        "data": {"workflowDefaults": DEFAULTS % "OnError"}
    }
    assert main(["doctor", "--cluster"]) in (0, 2)
    out = capsys.readouterr()
    assert "ignores set_retry" in out.out
    assert "the cluster is fit" in out.out
    assert "Kubernetes v1.33.4" in out.out
    assert "canary-token" not in out.out + out.err
    assert cluster.server.asked[0].headers["Authorization"] == "Bearer canary-token"


def test_a_finding_is_an_exit_status_of_2(cluster, capsys):
    drop(MINE)(cluster)
    assert main(["doctor", "--cluster", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["python"]
    assert found["cluster"]["version"] == "v1.33.4"
    assert not found["sane"]
    assert {frozenset(each) for each in found["findings"] + found["notes"]} == {frozenset({"what", "why", "fix"})}


def test_the_words_of_the_command_reach_the_cluster(cluster, capsys):
    cluster.mine = "other"
    main(["doctor", "--cluster", "--namespace", "other", "--system", "sys", "--account", "me", "--json"])
    paths = {each.path for each in cluster.server.asked}
    assert "/api/v1/namespaces/other" in paths
    assert "/api/v1/namespaces/sys/configmaps/workflow-controller-configmap" in paths
    assert "system:serviceaccount:other:me" in json.loads(capsys.readouterr().out)["cluster"]["rights"]


def test_what_is_about_to_be_run_is_looked_at(cluster, capsys):
    main(["doctor", "--cluster", "--json", "cluster.claim=elsewhere", "cluster.job.train=pytorchjob"])
    said = [each["what"] for each in json.loads(capsys.readouterr().out)["findings"]]
    assert any("elsewhere" in each for each in said), said


@pytest.mark.parametrize(("status", "word"), [(401, "log in"), (500, "look at")])
def test_a_cluster_that_cannot_be_asked_is_an_error(status, word, cluster, monkeypatch):
    monkeypatch.setattr(doctor_cluster, "PATIENCE_S", 0.0)
    cluster.server.answers = [refuses(status, "Reason")] * 20
    with pytest.raises(MillraceError) as caught:
        look()
    assert str(status) in caught.value.message
    assert word in caught.value.hint


def test_without_cluster_nothing_is_asked(cluster, capsys):
    main(["doctor"])
    assert cluster.server.asked == []
    assert "Kubernetes" not in capsys.readouterr().out


# Katib's configuration


def test_the_mended_configuration_passes_and_changes_nothing_else():
    config = copy.deepcopy(KATIB)
    del config["init"]
    config["runtime"]["suggestions"] = [
        {"algorithmName": "tpe", "image": "i"},
        {"algorithmName": "random", "securityContext": {"runAsUser": 7}},
    ]
    given = {
        "metadata": {"name": "katib-config", "namespace": "kubeflow", "resourceVersion": "1"},
        "data": {"katib-config.yaml": yaml.safe_dump(config), "other": "kept"},
    }
    assert katib_config.open_algorithms(config) == ["tpe", "random"]
    made = katib_config.mended(given)
    assert made["metadata"] == {"name": "katib-config", "namespace": "kubeflow"}
    assert made["data"]["other"] == "kept"
    found = katib_config.settings(made)
    assert katib_config.open_algorithms(found) == []
    assert found["init"]["controller"]["injectSecurityContext"] is True
    assert found["runtime"]["suggestions"][0]["image"] == "i"
    assert found["runtime"]["earlyStoppings"] == config["runtime"]["earlyStoppings"]
    assert katib_config.mended(made) == made


def test_every_kind_of_a_rule_is_known_to_the_client():
    """A rule for what the launcher cannot name would be a right too many."""
    known = {(kind.group, kind.plural) for kind in KINDS.values()}
    for rule in rbac.RULES:
        assert (rule.group, rule.resource.partition("/")[0]) in known
        assert rule.why
        assert set(rule.roles) <= set(rbac.ROLES)
