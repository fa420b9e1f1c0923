"""What is refused before it is sent: unknown fields, and what the webhooks refuse or take although it never runs."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from components.launch import batchjob, pytorchjob, trainjob
from components.launch.experiment import experiment
from components.launch.spec import training
from components.launch.validate import check, check_apart, key_of
from trainer.config.load import load
from trainer.errors import ConfigError

Object = dict[str, Any]


def training_as(render: Callable[..., Any], *words: str, name: str = "job") -> Object:
    made = render(training(load(None, ["cluster.job.nodes=2", *words]), name=name, args=["train"]))
    return dict(made if isinstance(made, dict) else made[-1])


def search(*words: str) -> Object:
    return experiment(load(None, ["tune.pruner=none", *words]), name="search", args=["trial"])[-1]


def changed(obj: Object, path: str, value: Any) -> Object:
    """A copy with the field at a dotted path set; None removes it."""
    made = copy.deepcopy(obj)
    *parents, last = path.split(".")
    node: Any = made
    for each in parents:
        node = node[int(each)] if isinstance(node, list) else node[each]
    if value is None:
        del node[last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return made


def refusal(obj: Object, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check([obj], **options)
    return caught.value.message


WORKER = "spec.pytorchReplicaSpecs.Worker"
POD = f"{WORKER}.template.spec"
ENV = f"{POD}.containers.0.env"
# Field -> a value that is wrong -> what must be said of it, the key first.
PYTORCHJOB: dict[str, tuple[str, Any, str]] = {
    "unknown field": ("spec.elasticPolcy", {}, "PyTorchJob spec.elasticPolcy: unknown field"),
    "unknown field of a pod": (f"{POD}.nodeSelecter", {}, "nodeSelecter: unknown field"),
    "unknown field of a container": (f"{POD}.containers.0.imge", "x", "containers.0.imge: unknown field"),
    "number for a text": ("spec.nprocPerNode", 4, "train.processes: must be str (given 4)"),
    "text for a number": (f"{WORKER}.replicas", "2", "cluster.job.nodes: must be int (given '2')"),
    "truth for a number": (f"{WORKER}.replicas", True, "cluster.job.nodes: must be int (given True)"),
    "list for an object": (f"{POD}.nodeSelector", ["a"], "cluster.job.node_selector: must be a dict"),
    "processes": ("spec.nprocPerNode", "many", "train.processes: must be auto, cpu, gpu or a number"),
    "no processes": ("spec.nprocPerNode", "0", "train.processes: "),
    "restart policy": (f"{WORKER}.restartPolicy", "OnFail", "restartPolicy: must be one of"),
    "min above max": ("spec.elasticPolicy.minReplicas", 3, "cluster.job.nodes: 3 to 2 nodes"),
    "max below": ("spec.elasticPolicy.maxReplicas", 1, "cluster.job.nodes: 2 to 1 nodes"),
    "fewer than min": ("spec.elasticPolicy", {"minReplicas": 3, "maxReplicas": 4}, "cluster.job.nodes: 3 to 4 nodes"),
    "backend": ("spec.elasticPolicy.rdzvBackend", "zookeeper", "must be one of c10d"),
    "no worker": (f"{WORKER}.replicas", 0, "cluster.job.nodes: must be at least 1"),
    "replica type": ("spec.pytorchReplicaSpecs.Chief", {"replicas": 1}, "must be Master or Worker"),
    "container's name": (f"{POD}.containers.0.name", "trainer", "one must have the name pytorch"),
    "image": (f"{POD}.containers.0.image", "", "cluster.image_prefix: must be named"),
    "clean pods": ("spec.runPolicy.cleanPodPolicy", "Some", "must be None, Running or All"),
    "time to live": ("spec.runPolicy.ttlSecondsAfterFinished", 0, "cluster.job.ttl_s: it is gone before its end is seen"),
    "managed": ("spec.runPolicy.managedBy", "me", "'me' is unknown"),
    "gang": ("spec.runPolicy.schedulingPolicy", {"minAvailable": 3}, "cluster.job.queue: waits for more pods than the 2"),
    "master's count": (
        "spec.pytorchReplicaSpecs.Master",
        {"replicas": 2, "template": {"spec": {"containers": [{"name": "pytorch", "image": "i"}]}}},
        "cluster.job.nodes: must be 1",
    ),
    "upper case": ("metadata.name", "Job", "--name: "),
    "leading digit": ("metadata.name", "1job", "--name: "),
    "dots": ("metadata.name", "a.b", "--name: "),
    "empty name": ("metadata.name", "", "--name: "),
    "name that pods make too long": ("metadata.name", "a" * 55, "more than 63"),
    "root": (f"{POD}.securityContext.runAsUser", 0, "cluster.user: must not be 0"),
    "reserved variable": (f"{ENV}.0", {"name": "PET_NNODES", "value": "1"}, "cluster.job.env: is set by the operator"),
    "operator's variable": (f"{ENV}.0", {"name": "RANK", "value": "1"}, "cluster.job.env: is set by the operator"),
    "variable twice": (
        ENV, [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}], "cluster.job.env: is set twice",
    ),
    "request over limit": (f"{POD}.containers.0.resources.requests.memory", "99Gi", "cluster.resources: asks for 99Gi"),
    "shared memory": (f"{POD}.volumes.1.emptyDir.sizeLimit", "64Gi", "cluster.shm: 64Gi of shared memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTORCHJOB)
def test_a_wrong_pytorchjob_is_refused_and_says_which_key(name: str) -> None:
    path, value, said = PYTORCHJOB[name]
    good = training_as(pytorchjob.pytorchjob)
    check([good])
    assert said in refusal(changed(good, path, value))


def test_master_and_workers_are_refused_only_where_the_policy_is_enforced() -> None:
    obj = training_as(pytorchjob.pytorchjob, "cluster.job.master=true")
    assert refusal(obj).startswith("cluster.job.master: the operator gives workers beside a Master an init container")
    check([obj], restricted=False)
    check([training_as(pytorchjob.pytorchjob, "cluster.job.master=true", "cluster.job.nodes=1")])


def test_the_longest_name_that_fits() -> None:
    check([training_as(pytorchjob.pytorchjob, name="a" * (63 - len("-worker-1")))])
    check([training_as(pytorchjob.pytorchjob, "cluster.job.nodes=11", name="a" * (63 - len("-worker-10")))])
    assert "--name" in refusal(
        training_as(pytorchjob.pytorchjob, "cluster.job.nodes=11", name="a" * (63 - len("-worker-1")))
    )
    check([training_as(batchjob.job, name="a" * 63)])


EXPERIMENT: dict[str, tuple[str, Any, str]] = {
    "unknown field": ("spec.maxTrails", 3, "spec.maxTrails: unknown field"),
    "unknown field of a trial": ("spec.trialTemplate.trialSpec.spec.backofLimit", 3, "trialSpec.spec.backofLimit: unknown field"),
    "parallel": ("spec.parallelTrialCount", 7, "cluster.job.parallel_trials: must be at most the number of trials, 6"),
    "failed": ("spec.maxFailedTrialCount", 7, "cluster.job.failed_trials: must be at most"),
    "trials": ("spec.maxTrialCount", 0, "tune.trials: must be at least 1"),
    "objective": ("spec.objective.type", "max", "tune.metric: must be minimize or maximize"),
    "algorithm": ("spec.algorithm.algorithmName", "simulated-annealing", "tune.sampler: must be one of"),
    "stopping": ("spec.earlyStopping", {"algorithmName": "hyperband"}, "tune.pruner: must be medianstop"),
    "no parameters": ("spec.parameters", [], "tune.space: there is nothing to search"),
    "kind of parameter": ("spec.parameters.0.parameterType", "real", "tune.space.train.lr: parameterType must be one of"),
    "bounds": ("spec.parameters.0.feasibleSpace.min", "5", "tune.space.train.lr.low: 5 must be below"),
    "collector": ("spec.metricsCollectorSpec.collector.kind", "Stdout", "collector.kind: must be one of"),
    "container": ("spec.trialTemplate.primaryContainerName", "training", "is none of main"),
    "condition": ("spec.trialTemplate.successCondition", None, "successCondition: must be given"),
    "undeclared": ("spec.trialTemplate.trialParameters.0.name", "other", "tune.space: is used by the trial, and not declared"),
    "unused": (
        "spec.trialTemplate.trialParameters", [{"name": "p0", "reference": "train.lr"}, {"name": "p1", "reference": "train.lr"}],
        "tune.space: is not used by the trial",
    ),
    "reference": ("spec.trialTemplate.trialParameters.0.reference", "train.rate", "'train.rate', which is no parameter"),
    "name of the trial": ("spec.trialTemplate.trialSpec.metadata.name", "x", "must be left out"),
    "words": ("spec.trialTemplate.trialSpec.spec.template.spec.containers.0.args.0", "a b", "through a shell"),
    "pod of the trial": (
        "spec.trialTemplate.trialSpec.spec.template.spec.hostNetwork", True, "hostNetwork: must not be true",
    ),
    "restarts of the trial's pod": (
        "spec.trialTemplate.trialSpec.spec.template.spec.restartPolicy", "Always", "must be Never or OnFailure",
    ),
    "name": ("metadata.name", "a" * 41, "--name: "),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENT)
def test_a_wrong_experiment_is_refused_and_says_which_key(name: str) -> None:
    path, value, said = EXPERIMENT[name]
    good = search()
    check([good])
    assert said in refusal(changed(good, path, value))


DISTRIBUTIONS = {
    "cmaes": ("logUniform", "cmaes draws evenly"),
    "sobol": ("logUniform", "sobol draws evenly"),
    "bayesianoptimization": ("uniform", "draws doubles on a logarithmic scale"),
    "grid": ("uniform", "a grid needs a step"),
}


@pytest.mark.parametrize("algorithm", DISTRIBUTIONS)
def test_algorithms_that_ignore_the_scale(algorithm: str) -> None:
    scale, said = DISTRIBUTIONS[algorithm]
    obj = changed(search(), "spec.algorithm.algorithmName", algorithm)
    obj["spec"]["parameters"][0]["feasibleSpace"]["distribution"] = scale
    assert f": {algorithm} {said}" in refusal(obj) or said in refusal(obj)


def test_a_wrong_trainjob_and_runtime_are_refused() -> None:
    runtime, job = trainjob.trainjob(training(load(None), name="job", args=["train"]))
    check([runtime, job])
    assert "cluster.job.nodes: must be at least 1" in refusal(changed(job, "spec.trainer.numNodes", 0))
    assert "unknown field" in refusal(changed(job, "spec.trainer.numberOfNodes", 1))
    assert "unknown field" in refusal(
        changed(runtime, "spec.template.spec.replicatedJobs.0.template.spec.template.spec.nodeSelecter", {})
    )
    assert "must have the name node" in refusal(changed(runtime, "spec.template.spec.replicatedJobs.0.name", "trainer"))


def test_other_kinds_are_refused() -> None:
    assert "is none of" in refusal({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {}})


def test_all_that_is_wrong_is_said_at_once() -> None:
    obj = changed(training_as(pytorchjob.pytorchjob), f"{WORKER}.restartPolicy", "x")
    lines = refusal(changed(obj, "spec.nprocPerNode", "many")).splitlines()
    assert len(lines) == 2


def test_the_check_in_a_process_of_its_own_says_the_same_and_imports_no_models_here() -> None:
    wrong = changed(training_as(pytorchjob.pytorchjob), "spec.nprocPerNode", 4)
    with pytest.raises(ConfigError) as caught:
        check_apart([wrong])
    assert caught.value.message == refusal(wrong)
    code = (
        "import json, sys; from components.launch.validate import check_apart; check_apart(json.load(sys.stdin));"
        "print(sorted({'kubernetes', 'kubeflow', 'kubeflow_katib_api', 'kfp', 'torch', 'numpy'} & set(sys.modules)))"
    )
    good = json.dumps([training_as(pytorchjob.pytorchjob)])
    done = subprocess.run([sys.executable, "-c", code], input=good, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_key_that_is_named_exists() -> None:
    from components.launch.validate import _KEYS
    from pipelines.reference import parameters

    known = {key.path for key in parameters()}
    for _, key in _KEYS:
        assert key in ("--name", "tune.space.{rest}") or key in known, key
    assert key_of("spec.parameters.train.lr.low") == "tune.space.train.lr.low"
    assert key_of("spec.somethingElse") == ""
