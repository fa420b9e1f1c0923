"""`millrace run --engine kubernetes` on a real cluster, with the rights that manifests/base gives and no others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import kube
from tests.kube import CLAIM, MOUNT, Volume, get, kubectl, wait_for
from tests.pipeline.conftest import SMALL, environment, run_in
from trainer.stage import STAGES

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
PORTS = [port for stage in STAGES.values() for port in stage.outputs]
# What its stages ask for: little enough for a node of two processors.
CLUSTER = [f"cluster.image_prefix={kube.REGISTRY}", f"cluster.claim={CLAIM}", "cluster.shm=64Mi"] + [
    f'cluster.resources.{stage}={{"cpu": "100m", "memory": "{memory}"}}'
    for stage, memory in {"configure": "1Gi", **dict.fromkeys(STAGES, "2Gi")}.items()
]

Millrace = Callable[..., "Terminal"]


class Terminal:
    """A `millrace run --engine kubernetes ...` and its output."""

    def __init__(self, folder: Path, env: dict[str, str], words: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "pipelines.cli", "run", "--engine", "kubernetes", *words]
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.seen = ""

    def until(self, start: str) -> str:
        """Read to the first line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen += line
            if line.startswith(start):
                return line
        raise AssertionError(f"no line {start!r} in:\n{self.seen}\n{self.process.communicate(timeout=30)[1]}")

    def end(self, code: int, deadline_s: float = 900) -> tuple[str, str]:
        """Its output and error output, once it has ended with this status."""
        try:
            out, err = self.process.communicate(timeout=deadline_s)
        finally:
            self.kill()
        assert self.process.returncode == code, f"{self.seen}{out}\n{err}"
        return self.seen + out, err

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate(timeout=30)


@pytest.fixture
def person(namespace: str, tmp_path: Path) -> Path:
    """A kubeconfig with the rights that the shipped Role millrace-user gives, and no others."""
    kubectl("-n", namespace, "create", "serviceaccount", "somebody")
    who = f"--serviceaccount={namespace}:somebody"
    kubectl("-n", namespace, "create", "rolebinding", "team", "--role=millrace-user", who)
    found = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    token = kubectl("-n", namespace, "create", "token", "somebody", "--duration=2h").strip()
    found["users"] = [{"name": "somebody", "user": {"token": token}}]
    found["contexts"][0]["context"] |= {"user": "somebody", "namespace": namespace}
    path = tmp_path / "person.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    run_in(folder, "millrace", "preset", "use", "text-classify")
    return folder


@pytest.fixture
def millrace(project: Path, person: Path) -> Millrace:
    """Start the engine in the project, as that person."""
    started: list[Terminal] = []

    def start(*words: str) -> Terminal:
        started.append(Terminal(project, environment() | {"KUBECONFIG": str(person)}, words))
        return started[-1]

    yield start
    for terminal in started:
        terminal.kill()


def jobs(namespace: str, stage: str) -> list[kube.Object]:
    return get(namespace, "jobs", "-l", f"app.kubernetes.io/component={stage}")


def test_a_run_is_left_survives_its_coordinator_and_promotes_a_better_model(
    namespace: str, project: Path, millrace: Millrace, volume: Volume
) -> None:
    laptop = project.with_name("laptop")
    laptop.mkdir()
    run_in(laptop, "millrace", "preset", "use", "text-classify")
    # A champion that has learned nothing.
    off = [f"{stage}.enabled=false" for stage in ("tune", "distill", "quantize")]
    run_in(laptop, "millrace", "run", *SMALL, *off, "train.lr=1e-9", code=4)
    run_in(laptop, "millrace", "registry", "promote", "v0001")
    volume.put(laptop / "registry", "registry")
    # The very rows: the images have a standard library of their own.
    raw = volume.put(laptop / "data" / "raw", "raw")
    data = [f"data.source={raw}/stdlib-functions.jsonl", "promote.model=text-classify"]
    terminal = millrace(*SMALL, *CLUSTER, *data)
    terminal.until("train: started")
    (before,) = wait_for("the training job", lambda: jobs(namespace, "train"), 60)
    terminal.process.send_signal(signal.SIGINT)
    _, err = terminal.end(130)
    assert "the run goes on" in err
    assert "--attach" in err
    pods = get(namespace, "pods", "-l", "app.kubernetes.io/component=chain")
    kubectl("-n", namespace, "delete", "pod", pods[0]["metadata"]["name"], "--grace-period=0", "--force", ok=False)
    out, _ = millrace("--attach").end(0)
    assert "PROMOTED" in out
    assert "better" in out
    assert "champion: v0002" in out
    (after,) = jobs(namespace, "train")
    assert after["metadata"]["uid"] == before["metadata"]["uid"], "training was started twice"
    made = project / "out" / "kubernetes" / "latest"
    version = json.loads(volume.text("registry/text-classify/versions/v0002/version.json"))
    assert version["digest"] == json.loads((made / "quantized" / "manifest.json").read_text("utf-8"))["digest"]
    assert [port for port in PORTS if not (made / port / "manifest.json").is_file()] == []
    assert (made / "evaluation" / "report.html").read_bytes().startswith(b"<!")
    listed, _ = millrace("--runs").end(0)
    assert made.resolve().name in listed
    # What goes away with the coordinator is all that the run has made.
    (coordinator,) = wait_for(
        "the coordinator's end",
        lambda: [job for job in jobs(namespace, "chain") if kube.condition(job, "Complete")],
        60,
    )
    owners = {each["metadata"]["ownerReferences"][0]["uid"] for each in jobs(namespace, "train")}
    assert owners == {coordinator["metadata"]["uid"]}


def test_a_failed_run_goes_on_where_it_failed(
    namespace: str, millrace: Millrace, volume: Volume, tmp_path: Path
) -> None:
    source = f"{MOUNT}/data/rows.csv"
    words = [*SMALL, *CLUSTER, f"data.source={source}", "tune.enabled=false"]
    out, err = millrace(*words, "--until", "preprocess").end(2)
    assert "stage configure ended with exit code 2" in err
    assert f"data.source: {source}: no such file or folder" in err
    assert jobs(namespace, "preprocess") == []
    _, err = millrace("--resume", "train.lr=1e-3").end(2)
    assert "never change" in err
    folder = tmp_path / "data"
    folder.mkdir()
    chosen = random.Random(7)
    rows = [
        f"{' '.join(f'{label}{chosen.randrange(90)}' for _ in range(9))},{label}"
        for label in ("x", "y")
        for _ in range(150)
    ]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    volume.put(folder, "data")
    out, _ = millrace("--resume", "--until", "preprocess").end(0)
    assert "an earlier attempt failed; it is removed and started again" in out
    assert "Stopped after preprocess" in out
    out, _ = millrace("--resume", "--until", "tune").end(0)
    assert out.count("cached") == 1
    assert "Stopped after tune" in out
    assert len(jobs(namespace, "chain")) == 3
    assert len(jobs(namespace, "preprocess")) == 1


def test_a_cancelled_run_leaves_nothing_but_what_it_stored(namespace: str, millrace: Millrace) -> None:
    out, _ = millrace(*SMALL, *CLUSTER, "--detach").end(0)
    run = out.split()[1]
    wait_for("the first job", lambda: jobs(namespace, "configure"), 120)
    millrace("--cancel", run).end(0)
    wait_for("all to be gone", lambda: not get(namespace, "jobs,pods"), 120)
    _, err = millrace("--attach", run).end(2)
    assert "no" in err


def test_a_namespace_without_the_account_or_the_claim_is_told_what_it_lacks(namespace: str, millrace: Millrace) -> None:
    _, err = millrace(*SMALL, *CLUSTER, "cluster.claim=nosuch").end(2)
    assert "cluster.claim" in err
    assert "nosuch" in err
    kubectl("-n", namespace, "delete", "serviceaccount", "millrace-launcher")
    _, err = millrace(*SMALL, *CLUSTER).end(2)
    assert "millrace-launcher" in err
    assert "doctor --cluster --namespace" in err
    assert get(namespace, "jobs") == []


def test_an_experiment_searches_and_its_best_values_are_what_two_nodes_train_with(
    namespace: str, project: Path, millrace: Millrace, volume: Volume
) -> None:
    words = ["cluster.job.tune=experiment", "cluster.job.parallel_trials=2", "tune.trials=4", "tune.sampler=random"]
    space = "tune.space={train.lr: {type: float, low: 0.01, high: 0.05}, train.weight_decay: {type: float, low: 0.0, high: 0.2}}"
    jobs = ["cluster.job.train=pytorchjob", "cluster.job.nodes=2"]
    out, _ = millrace(*SMALL, *CLUSTER, *words, space, *jobs, "--until", "train").end(0)
    (experiment,) = get(namespace, "experiments")
    assert kube.condition(experiment, "Succeeded"), out
    optimal = experiment["status"]["currentOptimalTrial"]
    run = f"runs/{experiment['metadata']['labels']['millrace.dev/run']}"
    trials = [json.loads(line) for line in volume.text(f"{run}/tuning/trials.jsonl").splitlines()]
    best = json.loads(volume.text(f"{run}/tuning/best.json"))
    assert len(trials) == 4
    assert best["value"] == max(trial["value"] for trial in trials)
    assert best["params"] == {row["name"]: float(row["value"]) for row in optimal["parameterAssignments"]}
    record = json.loads(volume.text(f"{run}/model/manifest.json"))["record"]
    used = {key: record["params"]["train"][key.removeprefix("train.")] for key in best["params"]}
    assert used == best["params"]
