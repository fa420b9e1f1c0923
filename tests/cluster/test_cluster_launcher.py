"""The launcher against a real API server, kubelet and training operator, with no rights but those that it is shipped with."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.launch import observe
from components.launch.api import Api, ApiError
from tests.cluster_jobs import (
    job_spec,
    launch,
    launcher_kubeconfig,
    pods,
    restricted_namespace,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

# What each pod of the samples below knows of itself.
RANK = "import os, sys, time\nrank = int(os.environ['MILLRACE_NODE_RANK'])\n"
FAILS = RANK + (
    "time.sleep(1)\n"
    "print('error: train.lr: must be positive (given -1)\\n  fix: for example train.lr=0.01', file=sys.stderr)\n"
    "sys.exit(2)\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A namespace, and a kubeconfig with the launcher's rights in it."""
    with restricted_namespace(f"l-launch-{secrets.token_hex(3)}") as name:
        yield name, launcher_kubeconfig(name, tmp_path_factory.mktemp("kube"))


@pytest.fixture
def cluster(place: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("KUBECONFIG", str(place[1]))
    return Api.connect()


@pytest.fixture
def name() -> str:
    return f"t{secrets.token_hex(4)}"


def gone(api: Api, name: str) -> bool:
    try:
        api.get("PyTorchJob", name)
    except ApiError as error:
        return error.status == 404 and not pods(api, name)
    return False


def test_success_streams_rank_0_in_order_and_once(cluster: Api, name: str) -> None:
    script = RANK + "for i in range(300):\n    print(f'rank {rank} line {i}')\n    time.sleep(0.01)\n"
    outcome, lines = launch(cluster, job_spec(name, cluster.namespace, script))
    assert outcome.ok, lines.text
    assert outcome.exit_code == 0
    assert [line for line in lines if line.startswith("rank")] == [f"rank 0 line {i}" for i in range(300)]


def test_permanent_failure_gives_the_exit_code_and_the_reason_of_the_stage_at_once(cluster: Api, name: str) -> None:
    outcome, lines = launch(cluster, job_spec(name, cluster.namespace, FAILS))
    assert (outcome.ok, outcome.exit_code) == (False, 2)
    assert "train.lr: must be positive (given -1)" in outcome.message
    assert outcome.hint == "for example train.lr=0.01"
    state, condition = observe.condition(cluster.get("PyTorchJob", name))
    assert state == "failed"
    assert lines.times[-1] - observe.seconds(condition["lastTransitionTime"]) < 10
    # Its pods have ended, so they and their logs stay for their time to live.
    assert {pod["status"]["phase"] for pod in pods(cluster, name)} == {"Failed"}


def test_a_failed_job_is_tried_again_by_the_same_call(cluster: Api, name: str) -> None:
    spec = job_spec(name, cluster.namespace, FAILS, nodes=1)
    launch(cluster, spec)
    first = cluster.get("PyTorchJob", name)["metadata"]["uid"]
    outcome, _ = launch(cluster, spec)
    assert outcome.exit_code == 2
    assert cluster.get("PyTorchJob", name)["metadata"]["uid"] != first
