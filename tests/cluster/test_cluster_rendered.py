"""What is rendered, on a real API server: taken strictly in a namespace that enforces restricted; how Jobs treat exit codes;
how values reach the trials of an Experiment; and that our checker of Pod Security says what the API server says.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from components.launch import batchjob, pytorchjob, trainjob
from components.launch.experiment import experiment
from components.launch.security import pod_specs, restricted
from components.launch.spec import JobSpec, stage, training
from components.launch.validate import check
from tests import kube
from tests.kube import Object, condition, get, kubectl, wait_for
from tests.unit.test_launch_render import KEYS
from tests.unit.test_launch_security import BAD, CONTAINER, GOOD
from trainer.config.load import load
from trainer.stage import STAGES

pytestmark = pytest.mark.cluster


def taken(namespace: str, *objects: Object) -> str:
    """What the API server says of objects that it would take; fails where it would not."""
    rows = [{**obj, "metadata": {**obj["metadata"], "namespace": namespace}} for obj in objects]
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": rows})
    return kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", given=document)


@pytest.mark.parametrize("words", [[], KEYS], ids=["nothing set", "everything set"])
def test_every_kind_is_taken_strictly(words: list[str], namespace: str) -> None:
    made: list[Object] = []
    for train in ("pod", "pytorchjob", "trainjob"):
        params = load(None, ["tune.pruner=none", "tune.sampler=random", *words, f"cluster.job.train={train}"])
        made += experiment(params, name=f"search-{train}", args=["trial"])
    spec = training(params, name="job", args=["train"])
    runtime, job = trainjob.trainjob(spec)
    made += [pytorchjob.pytorchjob(spec), runtime]
    made += [batchjob.job(stage(params, name, name=f"job-{name}", args=[name])) for name in STAGES]
    assert taken(namespace, *made).count("(server dry run)") == len(made)
    # The webhook of TrainJobs looks for the runtime itself.
    kube.apply({**runtime, "metadata": {**runtime["metadata"], "namespace": namespace}})
    assert "(server dry run)" in taken(namespace, job)


def pods_of_the_table() -> dict[str, Object]:
    """The pods of the unit tests, each with an image."""
    found = {"good": GOOD} | {name: {**GOOD, **change} for name, (change, _) in BAD.items()}
    for name, (change, _) in CONTAINER.items():
        for kind in ("containers", "initContainers"):
            own = {**GOOD["containers"][0]["securityContext"], **change}
            found[f"{name} in {kind}"] = {**GOOD, kind: [{"name": "b", "securityContext": own}]}
    for name, pod in found.items():
        found[name] = copy.deepcopy(pod)
        for container in [*found[name]["containers"], *found[name].get("initContainers", [])]:
            container["image"] = "x"
        for volume in found[name].get("volumes", []):
            if "nfs" in volume:
                volume["nfs"] = {"server": "a", "path": "/"}
    return found


def test_our_checker_of_pod_security_says_what_the_api_server_says(namespace: str) -> None:
    ours, theirs = {}, {}
    for name, pod in pods_of_the_table().items():
        obj = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": namespace}, "spec": pod}
        said = kubectl("apply", "--dry-run=server", "-f", "-", given=json.dumps(obj), ok=False)
        ours[name], theirs[name] = bool(restricted(pod)), "(server dry run)" not in said
    assert ours == theirs
    assert list(theirs.values()).count(False) == 1


def script(namespace: str, name: str, text: str, restarts: int = 2) -> Object:
    """A Job that runs a shell script."""
    spec = JobSpec(
        name, "train", kube.image("data"), (text,), namespace, command=("sh", "-c"), cpu="10m", memory="64Mi", shm="", grace_s=1,
        restarts=restarts,
    )  # fmt: skip
    return batchjob.job(spec)


def test_exit_codes_and_lost_pods_of_a_job(namespace: str) -> None:
    kube.apply(
        script(namespace, "permanent", "exit 3"),
        script(namespace, "killed", "exit 137", restarts=1),
        script(namespace, "lost", "sleep 15"),
        script(namespace, "told", "test \"$ODD\" = 'a $(HOME) $$ ${X} $'"),
        _with_env(script(namespace, "odd", "test \"$ODD\" = 'a $(HOME) $$ ${X} $'"), namespace),
    )

    def pods(job: str) -> list[Object]:
        found: list[Object] = get(namespace, "pods", "-l", f"millrace.dev/job={job}")
        return found

    failed = wait_for("permanent fails", lambda: condition(get(namespace, "job", "permanent"), "Failed"), 60)
    assert failed["reason"] == "PodFailurePolicy"
    assert len(pods("permanent")) == 1
    wait_for("lost runs", lambda: [pod for pod in pods("lost") if pod["status"]["phase"] == "Running"], 60)
    kubectl("-n", namespace, "delete", "pod", "-l", "millrace.dev/job=lost", "--wait=false")
    failed = wait_for("killed is given up", lambda: condition(get(namespace, "job", "killed"), "Failed"), 90)
    assert failed["reason"] == "BackoffLimitExceeded"
    assert len(pods("killed")) == 2
    wait_for("lost is put in place again", lambda: condition(get(namespace, "job", "lost"), "Complete"), 90)
    wait_for("odd texts arrive", lambda: condition(get(namespace, "job", "odd"), "Complete"), 60)
    assert condition(get(namespace, "job", "told"), "Failed")


def _with_env(job: Object, namespace: str) -> Object:
    """The Job, with a variable that params.yaml's cluster.job.env would set."""
    params = load(None, ["cluster.job.env={ODD: 'a $(HOME) $$ ${X} $'}"])
    (rendered,) = pod_specs(batchjob.job(training(params, name="x", args=[])))
    (pod,) = pod_specs(job)
    pod["containers"][0]["env"] = rendered["containers"][0]["env"]
    return job


SPACE = (
    "tune.space={train.lr: {type: float, low: 0.1, high: 0.8, step: 0.3}, "
    "train.batch_size: {type: int, low: 7, high: 11, step: 4}, "
    "train.compile: {type: categorical, choices: [true]}}"
)


def test_a_grid_reaches_trials_that_are_pytorchjobs_value_by_value(namespace: str) -> None:
    words = [SPACE, "tune.sampler=grid", "tune.trials=99", "tune.pruner=none", "cluster.job.train=pytorchjob"]
    cheap = ["cluster.resources={tune: {cpu: 10m, memory: 64Mi}}", "cluster.shm=1Mi", "cluster.job.parallel_trials=3"]
    params = load(None, [*words, *cheap])
    objects = experiment(params, name="grid", namespace=namespace, args=["trial"])
    (pod,) = pod_specs(objects[-1])
    # A trial prints its own rate as the metric; Katib's collector must have found it before it ends.
    pod["containers"][0] |= {
        "image": kube.image("data"),
        "command": ["sh", "-c", "sleep 8 && echo val_accuracy=${trialParameters.p0}"],
    }
    check(objects)
    kube.apply(*objects)

    def ended() -> Any:
        found = get(namespace, "experiment", "grid")
        assert not condition(found, "Failed"), found["status"]
        return found if condition(found, "Succeeded") else None

    found = wait_for("the grid is done", ended, 240)
    trials = get(namespace, "trials")
    tried = [tuple(each["value"] for each in trial["spec"]["parameterAssignments"]) for trial in trials]
    # Katib asks anew when its write of what was suggested conflicts: then a point may come twice, and another not at all.
    grid = {(lr, size, "true") for lr in ("0.1", "0.4", "0.7") for size in ("7", "11")}
    assert len(tried) == len(grid)
    assert grid.issuperset(tried)
    best = max(float(lr) for lr, _, _ in tried)
    assert float(found["status"]["currentOptimalTrial"]["observation"]["metrics"][0]["max"]) == best
