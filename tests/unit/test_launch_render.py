"""Jobs as PyTorchJob, TrainJob and batch Job: what each key of params.yaml does to them, and that all are valid."""

import dataclasses
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.launch import batchjob, names, pods, pytorchjob, trainjob
from components.launch.experiment import experiment
from components.launch.security import pod_specs, restricted
from components.launch.spec import PARAMS_ENV, JobSpec, checkpoints, digest, stage, training
from components.launch.validate import check
from components.table import TASKS
from trainer.config import Params
from trainer.config.load import load, validate
from trainer.errors import ConfigError
from trainer.stage import STAGES

KEYS = [
    "cluster.job.nodes=3", "train.processes=4", "cluster.gpus_per_node=4", "cluster.accelerator=amd.com/gpu",
    "cluster.job.devices={rdma/hca: 2}", "cluster.job.env={NCCL_DEBUG: INFO}", "cluster.secrets={TOKEN: keys/token}",
    "cluster.claim=shared", "cluster.mount=/data", "cluster.shm=1.5Gi", "cluster.pull_secrets=[registry]",
    "cluster.user=1234", "cluster.job.priority_class=high", "cluster.job.service_account=reader",
    "cluster.job.node_selector={zone: a}", "cluster.job.labels={team: x}", "cluster.job.annotations={note: y}",
    "cluster.job.tolerations=[{key: gpu, effect: NoSchedule}, {key: spot, operator: Equal, value: 'true'}]",
    "cluster.job.grace_s=120", "cluster.job.restarts=7", "cluster.job.ttl_s=600", "cluster.job.run_timeout_s=1000",
    "cluster.job.queue_timeout_s=500", "cluster.resources={train: {cpu: '3', memory: 9Gi}}",
]  # fmt: skip
RENDERERS = {
    "pytorchjob": lambda spec: [pytorchjob.pytorchjob(spec)],
    "trainjob": trainjob.trainjob,
    "job": lambda spec: [batchjob.job(spec)],
}


def spec_of(*words: str, **options: Any) -> JobSpec:
    return training(load(None, list(words)), name="job", args=["train", "--in", "dataset=/d"], **options)


def everything() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every kind of object that we author, with every key set and with none."""
    for words in ([], KEYS):
        params = load(None, [*words, "tune.sampler=random"])
        for kind, render in RENDERERS.items():
            yield kind, render(training(params, name="job", args=["train"]))
        for name in STAGES:
            yield name, [batchjob.job(stage(params, name, name="job", args=[name]))]
        for kind in ("pod", "pytorchjob", "trainjob"):
            tree = params.model_dump(mode="json")
            tree["cluster"]["job"]["train"] = kind
            yield f"experiment of {kind}", experiment(validate(tree), name="job", args=["trial"])


@pytest.mark.parametrize(
    ("kind", "objects"), list(everything()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_all_we_render_is_valid_and_passes_restricted(kind: str, objects: list[dict[str, Any]]) -> None:
    check(objects)
    found = [pod for obj in objects for pod in pod_specs(obj)]
    assert found
    for pod in found:
        assert restricted(pod) == []
        assert pod["automountServiceAccountToken"] is False
        assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in pod["containers"])


@pytest.mark.parametrize("kind", RENDERERS)
def test_every_key_reaches_the_pod(kind: str) -> None:
    (pod,) = [pod for obj in RENDERERS[kind](spec_of(*KEYS)) for pod in pod_specs(obj)]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"rdma/hca": "2", "amd.com/gpu": "4", "memory": "9Gi", "cpu": "3"},
        "limits": {"rdma/hca": "2", "amd.com/gpu": "4", "memory": "9Gi"},
    }
    values = {each["name"]: each.get("value") or each["valueFrom"] for each in container["env"]}
    assert values["NCCL_DEBUG"] == "INFO"
    assert values["TOKEN"] == {"secretKeyRef": {"name": "keys", "key": "token"}}
    count = "1" if kind == "job" else "3"
    assert values[pods.NODES_ENV] == count
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
        "/tmp": "tmp", "/dev/shm": "shm", "/data": "store",
    }  # fmt: skip
    assert {"name": "store", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1536Mi"}} in pod["volumes"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1234
    assert pod["terminationGracePeriodSeconds"] == 120
    assert (pod["priorityClassName"], pod["serviceAccountName"]) == ("high", "reader")
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"zone": "a"}, [{"name": "registry"}])
    assert pod["tolerations"] == [
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Equal", "value": "true"},
    ]


def test_a_pytorchjob_of_equals() -> None:
    obj = pytorchjob.pytorchjob(spec_of(*KEYS))
    body = obj["spec"]
    assert body["nprocPerNode"] == "4"  # the operator takes a text
    assert body["elasticPolicy"] == {"minReplicas": 3, "maxReplicas": 3, "rdzvBackend": "c10d", "maxRestarts": 7}
    assert list(body["pytorchReplicaSpecs"]) == ["Worker"]
    assert body["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
    assert body["runPolicy"] == {
        "cleanPodPolicy": "None", "ttlSecondsAfterFinished": 600, "activeDeadlineSeconds": 1500,
    }  # fmt: skip
    template = body["pytorchReplicaSpecs"]["Worker"]["template"]
    assert template["metadata"]["labels"]["team"] == "x"
    assert template["metadata"]["annotations"]["note"] == "y"
    rank = {each["name"]: each for each in template["spec"]["containers"][0]["env"]}[pods.NODE_RANK_ENV]
    assert rank["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['training.kubeflow.org/replica-index']"


def test_a_pytorchjob_with_a_master() -> None:
    body = pytorchjob.pytorchjob(spec_of("cluster.job.nodes=3", "cluster.job.master=true"))["spec"]
    assert {role: each["replicas"] for role, each in body["pytorchReplicaSpecs"].items()} == {"Master": 1, "Worker": 2}
    assert "elasticPolicy" not in body
    alone = pytorchjob.pytorchjob(spec_of("cluster.job.master=true"))["spec"]
    assert list(alone["pytorchReplicaSpecs"]) == ["Master"]


def test_a_trainjob_refers_to_its_runtime() -> None:
    runtime, job = trainjob.trainjob(spec_of(*KEYS))
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert (job["spec"]["trainer"]["numNodes"], job["spec"]["trainer"]["numProcPerNode"]) == (3, 4)
    (row,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert row["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert row["template"]["spec"]["backoffLimit"] == 7


def test_exit_codes_below_128_fail_a_job_at_once_and_those_of_signals_do_not() -> None:
    rules = batchjob.job(spec_of())["spec"]["podFailurePolicy"]["rules"]
    (fatal,) = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert fatal["values"] == list(range(1, 128))
    assert fatal["containerName"] == "main"


QUEUES = {
    "kueue": ["cluster.job.scheduler=kueue", "cluster.job.queue=research"],
    "volcano": ["cluster.job.scheduler=volcano", "cluster.job.queue=research", "cluster.job.nodes=2"],
}


@pytest.mark.parametrize("kind", RENDERERS)
def test_kueue_is_a_label_of_the_job_alone(kind: str) -> None:
    objects = RENDERERS[kind](spec_of(*QUEUES["kueue"]))
    labelled = [obj["kind"] for obj in objects if pods.QUEUE_LABEL in obj["metadata"]["labels"]]
    assert labelled == [objects[-1]["kind"]]
    assert all("schedulerName" not in pod for obj in objects for pod in pod_specs(obj))
    check(objects)


@pytest.mark.parametrize("kind", RENDERERS)
def test_volcano_schedules_all_pods_or_none(kind: str) -> None:
    objects = RENDERERS[kind](spec_of(*QUEUES["volcano"]))
    assert [pod["schedulerName"] for obj in objects for pod in pod_specs(obj)] == ["volcano"]
    if kind == "pytorchjob":
        assert objects[0]["spec"]["runPolicy"]["schedulingPolicy"] == {"queue": "research", "minAvailable": 2}
    if kind == "trainjob":
        assert objects[0]["spec"]["podGroupPolicy"] == {"volcano": {}}
    check(objects)


def test_no_accelerator_asks_for_none() -> None:
    spec = spec_of()
    assert not any("gpu" in name for name in pods.resources(spec)["requests"])
    assert "nvidia.com/gpu" in pods.resources(spec_of(gpus=2))["limits"]


@pytest.mark.parametrize("kind", RENDERERS)
def test_two_processes_never_share_an_accelerator(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"^train\.processes: 4 processes"):
        RENDERERS[kind](spec_of("train.processes=4", "cluster.gpus_per_node=2"))
    RENDERERS[kind](spec_of("train.processes=4"))


@pytest.mark.parametrize("kind", ["pod", "pytorchjob", "trainjob"])
def test_nor_do_those_of_a_trial(kind: str) -> None:
    words = ["tune.sampler=random", "train.processes=4", "cluster.gpus_per_node=2", f"cluster.job.train={kind}"]
    with pytest.raises(ConfigError, match=r"^train\.processes: 4 processes"):
        experiment(load(None, words), name="job", args=["trial"])


def test_a_stage_of_one_process_is_not_asked_how_many_train() -> None:
    params = load(None, ["train.processes=4", "cluster.gpus_per_node=4"])
    assert batchjob.job(stage(params, "distill", name="job", args=["distill"], gpus=1))


def test_accelerators_are_counted_in_one_place() -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.job\.devices: nvidia\.com/gpu"):
        spec_of("cluster.job.devices={nvidia.com/gpu: 1}")


def test_only_stages_with_accelerators_are_placed_among_them() -> None:
    params = load(None, KEYS)
    for name in STAGES:
        (pod,) = pod_specs(batchjob.job(stage(params, name, name="job", args=[name])))
        assert ("nodeSelector" in pod) == TASKS[name].accelerated
        assert pod["serviceAccountName"] == "reader"


def test_the_environment_holds_what_the_stage_reads_and_nothing_of_the_cluster() -> None:
    for name in STAGES:
        spec = stage(Params(), name, name="job", args=[name])
        told = json.loads(spec.env[PARAMS_ENV])
        assert set(STAGES[name].sections) <= set(told)
        assert "cluster" not in told


def test_no_value_of_ours_can_be_overwritten_by_the_users() -> None:
    spec = stage(load(None, [f"cluster.job.env={{{PARAMS_ENV}: x}}"]), "train", name="job", args=["train"])
    assert json.loads(spec.env[PARAMS_ENV])
    own = load(None, [f"cluster.job.labels={{{names.JOB_LABEL}: x}}"])
    template = pods.pod_template(training(own, name="job", args=[]), "main")
    assert template["metadata"]["labels"][names.JOB_LABEL] == "job"


def expanded(text: str) -> str:
    """What Kubernetes makes of a value (third_party/forked/golang/expansion), with no variable defined."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else found[0], text)


@given(st.text(alphabet="$(){}ab", max_size=12))
def test_texts_reach_the_pod_as_they_are(text: str) -> None:
    assert expanded(pods.escaped(text)) == text


@given(st.decimals(min_value=0, max_value=10**6, places=2), st.sampled_from(["", "m", "k", "M", "Ki", "Mi", "Gi"]))
def test_a_canonical_quantity_is_the_same_quantity(value: Any, unit: str) -> None:
    text = f"{value}{unit}"
    try:
        written = pods.canonical(text)
    except ZeroDivisionError:  # pragma: no cover
        pytest.fail(text)
    assert pods.number(written) == pods.number(text)
    assert pods.canonical(written) == written


def test_quantities_are_numbers() -> None:
    assert pods.number("500m") == Fraction(1, 2)
    assert pods.number("1.5Gi") == 3 * 2**29
    assert (pods.canonical("1024Mi"), pods.canonical("0.5Gi"), pods.canonical("1000M")) == ("1Gi", "512Mi", "1G")


def test_the_same_output_has_the_same_name() -> None:
    assert names.job_name("train", "s3://b/model") == names.job_name("train", "s3://b/model")
    assert names.job_name("train", "s3://b/model") != names.job_name("train", "s3://b/model2")
    assert max(len(names.job_name(each, "x")) for each in TASKS) <= names.MAX_EXPERIMENT


def test_the_digest_tells_specs_apart_and_nothing_else() -> None:
    one = pytorchjob.pytorchjob(spec_of())
    owned = pytorchjob.pytorchjob(dataclasses.replace(spec_of(), owner={"uid": "1"}, namespace="other"))
    other = pytorchjob.pytorchjob(spec_of("train.lr=0.5"))
    told = [each["metadata"]["annotations"][names.SPEC_ANNOTATION] for each in (one, owned, other)]
    assert told[0] == told[1] != told[2]
    assert told[0] == digest(one)


def test_the_digest_of_a_trainjob_covers_its_runtime() -> None:
    jobs = [trainjob.trainjob(spec_of(word))[1] for word in ("train.lr=0.5", "train.lr=0.25")]
    assert jobs[0]["spec"] == jobs[1]["spec"]
    assert len({job["metadata"]["annotations"][names.SPEC_ANNOTATION] for job in jobs}) == 2


def test_a_run_is_a_label_whatever_it_is_called() -> None:
    labels = names.labels("train", "My run / 2026-11-21 (second)" + "é" * 99)
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", labels[names.RUN_LABEL])
    assert names.RUN_LABEL not in names.labels("train")


def test_checkpoints_are_where_all_pods_see_them() -> None:
    claim = load(None, ["cluster.claim=shared", "cluster.mount=/data"])
    assert checkpoints(claim, "train", "/data/run/model", 2) == []
    assert checkpoints(claim, "train", "s3://bucket/run/model", 2) == ["--scratch", "/data/scratch/train"]
    assert checkpoints(load(None), "train", "s3://bucket/run/model", 1) == []
    with pytest.raises(ConfigError, match=r"^cluster.claim: not set, and the checkpoints of 2 nodes"):
        checkpoints(load(None), "train", "s3://bucket/run/model", 2)
