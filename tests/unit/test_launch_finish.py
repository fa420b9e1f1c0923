"""The last task of a run that has launched jobs: what it deletes, what it keeps, and that nothing fails it."""

import json

import pytest

from components.launch import finish
from components.launch.access import Login
from components.launch.api import Api
from tests.api_server import ApiServer, listed, pod, refuses, sends
from trainer import finish as plain

NS = "/namespaces/ns"
PYTORCHJOBS, TRAINJOBS = f"/apis/kubeflow.org/v1{NS}/pytorchjobs", f"/apis/trainer.kubeflow.org/v1alpha1{NS}/trainjobs"
RUNTIMES = f"/apis/trainer.kubeflow.org/v1alpha1{NS}/trainingruntimes"
NONE, NO_KIND = listed("1"), refuses(404, "NotFound")


def client(server):
    return Api(lambda: Login(server.url, "ns", lambda: "Bearer x"))


def job(name, *conditions):
    return pod(name, "1", status={"conditions": [{"type": each, "status": "True"} for each in conditions]})


def deleted(server):
    return [(each.path, (each.body or {}).get("preconditions")) for each in server.asked if each.method == "DELETE"]


def test_what_has_not_ended_is_deleted_and_the_rest_is_kept_for_its_logs():
    jobs = listed("1", job("over", "Created", "Succeeded"), job("lost", "Failed"), job("alive", "Created", "Running"))
    held = listed("1", job("queued", "Suspended"))
    pods = listed(
        "1", pod("over-0", "1", status={"phase": "Succeeded"}), pod("over-1", "1", status={"phase": "Running"})
    )
    answers = [NO_KIND, jobs, pods, sends(), NONE, sends(), held, sends(), sends(), NONE, NONE, NONE]
    with ApiServer(*answers) as server:
        removed = finish.sweep(client(server), "run-1")
    assert removed == ["PyTorchJob alive", "TrainJob queued"]
    assert deleted(server) == [
        (f"/api/v1{NS}/pods/over-1", {"uid": "uid-over-1"}),
        (f"{PYTORCHJOBS}/alive", {"uid": "uid-alive"}),
        (f"{TRAINJOBS}/queued", {"uid": "uid-queued"}),
        (f"{RUNTIMES}/queued", None),
    ]
    assert server.asked[0].path.endswith("/experiments"), "or it would put the jobs of its trials in place again"
    asked = {each.query["labelSelector"] for each in server.asked if each.method == "GET"}
    assert asked == {"millrace.dev/run=run-1", "millrace.dev/job=over", "millrace.dev/job=lost"}


def test_what_has_ended_goes_too_if_that_is_asked_for():
    jobs = listed("1", job("over", "Succeeded"), job("lost", "Failed"))
    with ApiServer(NONE, jobs, sends(), sends(), NONE, NONE, NONE, NONE) as server:
        assert finish.sweep(client(server), "run-1", ended=True) == ["PyTorchJob over", "PyTorchJob lost"]


def test_nothing_is_cleaned_in_the_store_while_a_pod_may_still_write(monkeypatch):
    monkeypatch.setattr(finish, "_POLL_S", 0.01)
    ending = listed("1", job("alive", "Failed"))  # its pods end, its own finalizer holds it
    answers = [NONE, listed("1", job("alive", "Running")), sends(), NONE, NONE, ending, ending, NONE]
    with ApiServer(*answers) as server:
        finish.sweep(client(server), "run-1")
        assert not server.answers
    assert [each.method for each in server.asked[-3:]] == ["GET"] * 3


def test_a_right_that_is_missing_hides_no_other_job(capsys):
    answers = [
        refuses(403, "Forbidden", "experiments is forbidden"),
        listed("1", job("alive")),
        sends(),
        NONE,
        NONE,
        NONE,
    ]
    with ApiServer(*answers) as server:
        assert finish.sweep(client(server), "run-1") == ["PyTorchJob alive"]
    out = capsys.readouterr().out
    assert "Experiments of this run were not removed" in out
    assert "experiments is forbidden" in out


@pytest.mark.parametrize("identity", ["run-1", ""])
def test_without_a_cluster_the_run_ends_as_it_did(identity, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv(plain.NOTIFY_URL, raising=False)
    unfinished = tmp_path / "store" / "run-1" / "train" / "a1" / "model"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_text("x")
    values = {"run_id": identity, "store": str(tmp_path / "store"), "status": {"state": "FAILED"}}
    given = {"inputs": {"parameterValues": values}, "outputs": {"outputFile": f"{tmp_path}/output.json"}}
    assert finish.run(json.dumps(given)) == 0
    assert unfinished.exists() == (not identity)
    assert ("no cluster" in capsys.readouterr().out) == bool(identity)
    assert (tmp_path / "output.json").exists()
