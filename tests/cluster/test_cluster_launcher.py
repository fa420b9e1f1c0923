"""The launcher against a real API server, kubelet and training operator, with no rights but those that it is shipped with."""

from __future__ import annotations

import os
import secrets
import signal
import time
from pathlib import Path

import pytest

from components.launch import batchjob, observe
from components.launch.api import Api, ApiError
from components.launch.pytorchjob import pytorchjob
from components.launch.trainjob import trainjob
from tests import kube
from tests.cluster_jobs import Launcher, job_spec, launch, pods, service_account, wait_for
from trainer.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

# What each pod of the samples below knows of itself.
RANK = "import os, sys, time\nrank = int(os.environ['MILLRACE_NODE_RANK'])\n"
FAILS = RANK + (
    "time.sleep(1)\n"
    "print('error: train.lr: must be positive (given -1)\\n  fix: for example train.lr=0.01', file=sys.stderr)\n"
    "sys.exit(2)\n"
)


@pytest.fixture
def name() -> str:
    return f"t{secrets.token_hex(4)}"


def gone(api: Api, name: str) -> bool:
    try:
        api.get("PyTorchJob", name)
    except ApiError as error:
        return error.status == 404 and not pods(api, name)
    return False


def test_success_streams_rank_0_in_order_and_once(api: Api, name: str) -> None:
    script = RANK + "for i in range(300):\n    print(f'rank {rank} line {i}')\n    time.sleep(0.01)\n"
    outcome, lines = launch(api, job_spec(name, api.namespace, script))
    assert outcome.ok, lines.text
    assert outcome.exit_code == 0
    assert [line for line in lines if line.startswith("rank")] == [f"rank 0 line {i}" for i in range(300)]


def test_permanent_failure_gives_the_exit_code_and_the_reason_of_the_stage_at_once(api: Api, name: str) -> None:
    outcome, lines = launch(api, job_spec(name, api.namespace, FAILS))
    assert (outcome.ok, outcome.exit_code) == (False, 2)
    assert "train.lr: must be positive (given -1)" in outcome.message
    assert outcome.hint == "for example train.lr=0.01"
    state, condition = observe.condition(api.get("PyTorchJob", name))
    assert state == "failed"
    assert lines.times[-1] - observe.seconds(condition["lastTransitionTime"]) < 10
    # Its pods have ended, so they and their logs stay for their time to live.
    assert {pod["status"]["phase"] for pod in pods(api, name)} == {"Failed"}


def test_a_failed_job_is_tried_again_by_the_same_call(api: Api, name: str) -> None:
    spec = job_spec(name, api.namespace, FAILS, nodes=1)
    launch(api, spec)
    first = api.get("PyTorchJob", name)["metadata"]["uid"]
    outcome, _ = launch(api, spec)
    assert outcome.exit_code == 2
    assert api.get("PyTorchJob", name)["metadata"]["uid"] != first


SLEEPS = RANK + "print(f'rank {rank} of pod', os.uname().nodename, flush=True)\ntime.sleep(600)\n"


def test_more_gpus_than_there_are_is_unschedulable_at_the_queue_deadline_and_leaves_nothing(
    api: Api, name: str
) -> None:
    outcome, lines = launch(api, job_spec(name, api.namespace, SLEEPS, gpus=64, queue_timeout_s=8.0))
    assert (outcome.ok, outcome.reason) == (False, "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in outcome.message
    assert any("Insufficient nvidia.com/gpu" in line for line in lines[:3]), lines.text
    assert gone(api, name)


def test_a_wrong_image_is_named_long_before_the_queue_deadline(
    api: Api, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.launch.judge.PATIENCE_S", 15.0)
    outcome, lines = launch(api, job_spec(name, api.namespace, SLEEPS, image="docker.io/nobody/nothing:0"))
    assert outcome.reason in ("ImagePullBackOff", "ErrImagePull"), lines.text
    assert "docker.io/nobody/nothing:0" in outcome.message
    assert outcome.exit_code == 2
    assert outcome.waited_s < 40
    assert gone(api, name)


def test_a_missing_secret_is_named(api: Api, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.launch.judge.PATIENCE_S", 5.0)
    outcome, lines = launch(api, job_spec(name, api.namespace, SLEEPS, secret_env={"TOKEN": "nowhere/key"}))
    assert outcome.reason == "CreateContainerConfigError", lines.text
    assert "nowhere" in outcome.message
    assert "cluster.secrets" in outcome.hint
    assert gone(api, name)


def test_a_volume_that_cannot_be_mounted_is_named(api: Api, name: str) -> None:
    asked = job_spec(name, api.namespace, "print(1)", nodes=1, queue_timeout_s=30.0)
    job = pytorchjob(asked)
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["volumes"].append({"name": "lost", "configMap": {"name": "not-there"}})
    pod["containers"][0]["volumeMounts"].append({"name": "lost", "mountPath": "/lost"})
    outcome, lines = launch(api, asked, [job])
    assert (outcome.ok, outcome.reason) == (False, "FailedMount"), lines.text
    assert "not-there" in outcome.message
    assert gone(api, name)


def test_killed_and_started_again_it_attaches_to_the_one_job(api: Api, name: str, launcher_kubeconfig: Path) -> None:
    script = RANK + "for i in range(30):\n    print(f'line {i}')\n    time.sleep(0.5)\n"
    with Launcher(launcher_kubeconfig, name, api.namespace, script) as first:
        first.says("line 3")
        first.signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    uid = api.get("PyTorchJob", name)["metadata"]["uid"]
    with Launcher(launcher_kubeconfig, name, api.namespace, script) as second:
        assert second.wait() == 0, second.lines.text
        assert "attached to the one started at" in second.lines.text
        assert "line 29" in second.lines
    assert api.get("PyTorchJob", name)["metadata"]["uid"] == uid
    made = [event for event in api.list("Event") if event["reason"] == "SuccessfulCreatePod"]
    assert len(made) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_the_job_away(api: Api, name: str, launcher_kubeconfig: Path, number: int) -> None:
    with Launcher(launcher_kubeconfig, name, api.namespace, SLEEPS) as process:
        process.says("rank 0 of pod")
        process.signal(number)
        # Kubeflow gives a step 0.6 s: by then the request must be out.
        wait_for(lambda: _going(api, name), 0.6)
        assert process.wait(30) == 128 + number
    assert gone(api, name)


def _going(api: Api, name: str) -> bool:
    try:
        return bool(api.get("PyTorchJob", name)["metadata"].get("deletionTimestamp"))
    except ApiError as error:
        return error.status == 404


def test_exit_137_for_ever_is_given_up_after_the_restarts_and_the_pods_are_removed(api: Api, name: str) -> None:
    script = RANK + "print('again')\ntime.sleep(1)\nos._exit(137) if rank else time.sleep(600)\n"
    outcome, lines = launch(api, job_spec(name, api.namespace, script, restarts=2))
    assert not outcome.ok
    assert "cluster.job.restarts is 2" in outcome.message, lines.text
    assert "exit code 137" in outcome.message
    assert outcome.restarts == 3
    assert gone(api, name)


@pytest.mark.parametrize(
    ("other", "word"), [("time.sleep(600)", "still runs"), ("time.sleep(6); sys.exit(3)", "exit code 3")]
)
def test_success_of_worker_0_alone_is_red(
    api: Api, name: str, other: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.launch.judge.GRACE_S", 10.0)
    script = RANK + f"time.sleep(2)\nif rank:\n    {other}\n"
    outcome, lines = launch(api, job_spec(name, api.namespace, script))
    assert observe.condition(api.get("PyTorchJob", name))[0] == "succeeded"
    assert (outcome.ok, outcome.reason) == (False, "Incomplete"), lines.text
    assert outcome.exit_code != 0
    assert f"worker-1 {word}" in outcome.message or f"worker-1 ended with {word}" in outcome.message
    assert not [pod for pod in pods(api, name) if pod["status"]["phase"] == "Running"]
    old = api.get("PyTorchJob", name)["metadata"]["uid"]
    outcome, lines = launch(api, job_spec(name, api.namespace, script))
    assert "an earlier attempt failed" in lines.text, "a second call must not find a success"
    assert not outcome.ok
    assert api.get("PyTorchJob", name)["metadata"]["uid"] != old


def test_a_deleted_pod_is_put_in_place_again_and_its_log_goes_on(
    api: Api, name: str, launcher_kubeconfig: Path
) -> None:
    script = RANK + "print('begun', os.getpid())\ntime.sleep(6)\nprint('done')\n"
    with Launcher(launcher_kubeconfig, name, api.namespace, script) as process:
        process.says("begun")
        old = api.get("Pod", f"{name}-worker-0")["metadata"]["uid"]
        api.delete("Pod", f"{name}-worker-0")
        assert process.wait() == 0, process.lines.text
    assert api.get("Pod", f"{name}-worker-0")["metadata"]["uid"] != old
    assert process.lines.text.count("begun") == 2
    assert process.lines.count("done") == 1
    assert "1 of at most 2 pods put in place again" in process.lines.text


def test_out_of_memory_is_named(api: Api, name: str) -> None:
    script = RANK + "time.sleep(1)\nx = [bytearray(1 << 20) for _ in range(512)] if rank else time.sleep(600)\n"
    outcome, lines = launch(api, job_spec(name, api.namespace, script, memory="32Mi", restarts=0))
    assert outcome.reason == "OOMKilled", lines.text
    assert "cluster.resources.train.memory" in outcome.hint
    assert "limit of 32Mi" in outcome.message
    assert gone(api, name)


def test_a_quota_that_is_exceeded_is_named(api: Api, name: str) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small", "namespace": api.namespace}}
    kube.apply({**quota, "spec": {"hard": {"pods": "1"}}})
    wait_for(lambda: "hard" in kube.kubectl("-n", api.namespace, "get", "quota", "small", "-o", "jsonpath={.status}"))
    outcome, lines = launch(api, job_spec(name, api.namespace, SLEEPS, queue_timeout_s=10.0))
    assert outcome.reason == "FailedCreate", lines.text
    assert "exceeded quota: small" in outcome.message
    assert gone(api, name)


def test_another_job_of_the_same_name_is_in_the_way_until_it_has_ended(api: Api, name: str) -> None:
    spec = job_spec(name, api.namespace, SLEEPS, nodes=1)
    api.create(pytorchjob(spec))
    with pytest.raises(ConfigError) as error:
        launch(api, job_spec(name, api.namespace, FAILS, nodes=1))
    assert f"delete pytorchjob {name}" in error.value.hint
    api.delete("PyTorchJob", name, propagation="Foreground")


def test_a_launcher_that_waits_costs_at_most_60_mb_and_a_hundredth_of_a_core(
    api: Api, name: str, launcher_kubeconfig: Path, tmp_path: Path
) -> None:
    with Launcher(service_account(launcher_kubeconfig, tmp_path), name, api.namespace, SLEEPS) as process:
        process.says("all 2 pods run")
        time.sleep(3)
        status, before = Path(f"/proc/{process.process.pid}/status"), _cpu(process.process.pid)
        time.sleep(20)
        share = (_cpu(process.process.pid) - before) / 20
        resident = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        process.signal(signal.SIGTERM)
        assert process.wait(30) == 143
    print(f"a launcher that waits: {resident / 1000:.1f} MB, {share:.2%} of a core")
    assert resident <= 60_000
    assert share <= 0.01


def _cpu(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("script", "code"), [("print('done')", 0), ("sys.exit('error: bad\\n  fix: mend')", 1)])
def test_a_trainjob_ends_as_its_pods_do(api: Api, name: str, script: str, code: int) -> None:
    spec = job_spec(name, api.namespace, RANK + f"time.sleep(2)\n{script}\n")
    outcome, lines = launch(api, spec, trainjob(spec))
    assert (outcome.ok, outcome.exit_code) == (code == 0, code), lines.text
    assert ("done" in lines) is (code == 0)
    assert ("bad" in outcome.message) is (code == 1)


def test_a_job_of_one_pod_ends_as_the_pod_does(api: Api, name: str) -> None:
    spec = job_spec(name, api.namespace, "import sys\nsys.exit('error: bad\\n  fix: mend')", nodes=1)
    outcome, lines = launch(api, spec, [batchjob.job(spec)])
    assert (outcome.ok, outcome.exit_code) == (False, 1), lines.text
    assert outcome.message.endswith(": bad")
