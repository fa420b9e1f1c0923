"""What is removed and what is attached to, against a real HTTP server: nobody else's job, and no success that was none."""

import pytest

from components.launch import names, submit
from components.launch.access import Login
from components.launch.api import Api
from components.launch.pytorchjob import pytorchjob
from components.launch.spec import JobSpec
from tests.api_server import ApiServer, listed, refuses, sends

SPEC = JobSpec("job", "train", "docker.io/millrace/trainer:1", ("train",), namespace="ns", grace_s=0)
MANIFEST = [pytorchjob(SPEC)]
GONE = refuses(404, "NotFound")


def client(server):
    return Api(lambda: Login(server.url, "ns", lambda: ""))


def found(uid="u", digest="", conditions=(), annotations=(), managed_by=names.MANAGER):
    """A job as it stands in the cluster."""
    meta = {
        "name": "job", "uid": uid, "creationTimestamp": "2026-11-21T10:00:00Z",
        "labels": {"app.kubernetes.io/managed-by": managed_by},
        "annotations": {
            names.SPEC_ANNOTATION: digest or MANIFEST[0]["metadata"]["annotations"][names.SPEC_ANNOTATION],
            **dict.fromkeys(annotations, "Incomplete"),
        },
    }  # fmt: skip
    status = {"conditions": [{"type": each, "status": "True"} for each in conditions]}
    return sends(200, {"kind": "PyTorchJob", "metadata": meta, "status": status})


def deleted(server):
    return [(each.body or {}).get("preconditions") for each in server.asked if each.method == "DELETE"]


def test_a_signal_before_the_job_was_made_removes_the_one_that_we_were_making():
    with ApiServer(found(), sends(), GONE, listed("1")) as server:
        submit.withdraw(client(server), SPEC, MANIFEST, uid="")
        assert deleted(server) == [{"uid": "u"}]


@pytest.mark.parametrize("other", [found(managed_by="somebody"), found(digest="another"), GONE])
def test_a_signal_before_the_job_was_found_to_be_ours_removes_nothing(other):
    with ApiServer(other) as server:
        submit.withdraw(client(server), SPEC, MANIFEST, uid="")
        assert deleted(server) == []


def test_a_job_of_the_same_name_that_was_made_since_stays_and_is_not_waited_for():
    with ApiServer(refuses(409, "Conflict")) as server:
        submit.withdraw(client(server), SPEC, MANIFEST, uid="mine")
        assert deleted(server) == [{"uid": "mine"}]
        assert len(server.asked) == 1


def test_a_success_that_a_launcher_found_to_be_none_is_started_again():
    again = found(uid="new")
    refuted = found(conditions=["Succeeded"], annotations=[names.REFUTED_ANNOTATION])
    answers = [refuted, sends(), GONE, listed("1"), GONE, listed("1"), again]
    with ApiServer(*answers) as server:
        job = submit.attach(client(server), SPEC, MANIFEST, [].append)
        assert deleted(server) == [{"uid": "u"}]
    assert job["metadata"]["uid"] == "new"


def test_a_success_is_found_again():
    with ApiServer(found(conditions=["Succeeded"])) as server:
        assert submit.attach(client(server), SPEC, MANIFEST, [].append)["metadata"]["uid"] == "u"
