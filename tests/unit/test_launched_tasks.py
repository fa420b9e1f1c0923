"""Training and search as jobs of the cluster, in the compiled pipeline: tasks that start them and wait.

The golden file pipeline-jobs.yaml shows the whole; here is what must hold of any such pipeline.
"""

import functools
import json

import pytest

from components.table import TASKS, compiled
from pipelines import compiler, containers, golden
from trainer import configure, executor, presets
from trainer.config import Params
from trainer.config.load import validate
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError

# What is compiled in, and which tasks then launch.
CASES = {
    "nothing": ({}, set()),
    "a PyTorchJob": ({"train": "pytorchjob"}, {"train"}),
    "a TrainJob": ({"train": "trainjob"}, {"train"}),
    "an Experiment": ({"tune": "experiment"}, {"tune"}),
    "both": ({"train": "pytorchjob", "tune": "experiment"}, {"tune", "train"}),
}


def params_of(case: str) -> Params:
    return validate({"cluster": {"job": CASES[case][0], "store": "s3://bucket/runs"}})


@functools.cache
def package(case: str) -> tuple[dict, dict]:
    spec, platform = compiler.package(params_of(case))
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def task(case: str, name: str) -> dict:
    spec = package(case)[0]
    dags = [each.get("dag", {}).get("tasks", {}) for each in [spec["root"], *spec["components"].values()]]
    return next(tasks[name] for tasks in dags if name in tasks)


def container(case: str, name: str) -> dict:
    return package(case)[0]["deploymentSpec"]["executors"][f"exec-{name}"]["container"]


def parameters(case: str, name: str) -> dict:
    return package(case)[0]["components"][f"comp-{name}"]["inputDefinitions"]["parameters"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_compiled_decides_which_tasks_launch(case):
    launching = {name for name in TASKS if container(case, name)["command"] == ["python", "-m", "components.launch"]}
    assert launching - {"finish"} == CASES[case][1]
    assert ("finish" in launching) == bool(CASES[case][1]), "who launches nothing has nothing to delete"
    assert {name for name in TASKS if "/launcher:" in container(case, name)["image"]} == launching
    for name in launching:
        assert container(case, name)["args"] == [name, "--executor-input", "{{$}}"]


@pytest.mark.parametrize("name", ["tune", "train"])
def test_a_task_that_waits_asks_for_little_whatever_its_job_asks_for(name):
    params = validate({"cluster": {
        "job": CASES["both"][0], "store": "s3://bucket/runs", "gpus_per_node": 8,
        "resources": {name: {"cpu": "16", "memory": "200Gi"}},
    }})  # fmt: skip
    spec, platform = compiler.package(params)
    resources = spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"]["resources"]
    assert resources["resourceCpuRequest"] == "50m"
    assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == "128Mi"
    assert "accelerator" not in resources
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]
    assert [mount["mountPath"] for mount in placed["emptyDirMounts"]] == ["/tmp"]


@pytest.mark.parametrize("name", ["tune", "train", "finish"])
def test_a_task_that_launches_is_restricted_and_placed_as_others_are(name):
    launched, plain = package("both")[1][f"exec-{name}"], package("nothing")[1][f"exec-{name}"]
    assert launched["securityContext"] == {"runAsUser": "65532", "runAsGroup": "65532", "runAsNonRoot": True}
    assert {key: launched[key] for key in launched if key != "emptyDirMounts"} == {
        key: plain[key] for key in plain if key != "emptyDirMounts"
    }
    assert task("both", name)["retryPolicy"] == task("nothing", name)["retryPolicy"]


@pytest.mark.parametrize("name", ["tune", "train"])
def test_a_task_that_launches_is_told_of_its_job(name):
    given = task("both", name)["inputs"]["parameters"]
    compiled_in = json.loads(given["cluster_params"]["runtimeValue"]["constant"])
    assert validate({"cluster": compiled_in}).cluster == params_of("both").cluster
    assert given["nodes"] == {"componentInputParameter": "pipelinechannel--configure-train_nodes"}
    assert given["gpus"] == {"componentInputParameter": f"pipelinechannel--configure-{name}_gpus"}
    assert given["store"] == {"componentInputParameter": "pipelinechannel--store"}
    assert task("both", "configure")["inputs"]["parameters"]["cluster_params"] == given["cluster_params"]


@pytest.mark.parametrize("name", ["tune", "train"])
def test_a_task_has_the_same_ports_caching_and_sections_whoever_works(name):
    more = {"gpus", "nodes", "cluster_params", "parallel_params" if name == "tune" else "tune_params"}
    assert more <= set(parameters("both", name))
    assert (
        package("both")[0]["components"][f"comp-{name}"]["outputDefinitions"]
        == (package("nothing")[0]["components"][f"comp-{name}"]["outputDefinitions"])
    )
    assert set(parameters("both", name)) - more == set(parameters("nothing", name)) - more
    assert task("both", name)["cachingOptions"] == task("nothing", name)["cachingOptions"] == {"enableCache": True}
    assert task("both", name)["inputs"]["artifacts"] == task("nothing", name)["inputs"]["artifacts"]


@pytest.mark.parametrize("name", ["tune", "train"])
def test_nothing_that_is_new_in_each_run_is_in_the_cache_key(name):
    # The backend writes the run's id in place of the placeholder before it makes the key.
    assert "{{$.pipeline_job" not in json.dumps(task("both", name)["inputs"])


def test_what_configure_finds_reaches_the_launcher(tmp_path):
    """As the backend does it: outputs of `configure` and constants of the package make the ExecutorInput of `train`."""
    from components.launch import kfp

    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text {n},topic {n % 3}\n" for n in range(60)))
    given = task("both", "train")["inputs"]["parameters"]
    compiled_in = given["cluster_params"]["runtimeValue"]["constant"]
    form = {"params": "{}", "data": str(tmp_path / "rows.csv"), "nodes": 3.0, "gpus_per_node": 2.0, "store": "memory://runs",
            "overrides": "train.epochs=7", "cluster_params": compiled_in}  # fmt: skip
    output = {"parameters": {}, "artifacts": {}, "outputFile": str(tmp_path / "output.json")}
    assert configure.run(json.dumps({"inputs": {"parameterValues": form}, "outputs": output}), []) == 0
    found = json.loads((tmp_path / "output.json").read_text())["parameterValues"]
    values = {"cluster_params": compiled_in, "store": form["store"]}
    for name, value in given.items():
        if name not in values:
            values[name] = found[value["componentInputParameter"].removeprefix("pipelinechannel--configure-")]
    model = {"artifacts": [{"name": "model", "uri": "minio://b/v2/artifacts/millrace/run-1/train/a1/model"}]}
    text = json.dumps({
        "inputs": {"parameterValues": values},
        "outputs": {"artifacts": {"model": model}, "outputFile": "x"},
    })  # fmt: skip
    asked = kfp.read("train", executor.read(text), text, [])
    assert (asked.nodes, asked.gpus, asked.run) == (3, 2, "run-1")
    assert asked.params.cluster == params_of("both").cluster
    assert (asked.params.train.epochs, asked.params.train.processes) == (7, 2)
    assert asked.outputs == {"model": "memory://runs/run-1/train/a1/model"}


def test_what_others_ask_the_table_is_not_what_is_compiled():
    # components/launch takes the image and the resources of a job's pods from the same table.
    assert compiled(params_of("both"))["train"].image == "launcher"
    assert TASKS["train"].image == "trainer"


def test_the_run_form_has_the_nodes_that_were_compiled_in():
    params = validate({"cluster": {"job": {"train": "pytorchjob", "nodes": 4}}})
    assert compiler.spec(params)["root"]["inputDefinitions"]["parameters"]["nodes"]["defaultValue"] == 4


def test_several_nodes_without_a_job_are_refused_before_anything_is_written():
    with pytest.raises(ConfigError, match=r"cluster\.job\.nodes: 2") as caught:
        compiler.package(validate({"cluster": {"job": {"nodes": 2}}}))
    assert "cluster.job.train=pytorchjob" in caught.value.hint


@pytest.mark.parametrize("case", CASES)
def test_the_docker_engine_launches_nothing(case):
    params = validate(
        parse_yaml(presets.text(presets.DEFAULT), "") | {"cluster": {"job": {**CASES[case][0], "nodes": 1}}}
    )
    spec, _ = containers._pipeline(params)
    found = [each["container"] for each in spec["deploymentSpec"]["executors"].values()]
    assert {each["command"][2] for each in found} == {"trainer"}
    assert not any("launcher" in each["image"] for each in found)
    said = containers._not_here(params.cluster.job)
    assert all(f"cluster.job.{name}={CASES[case][0][name]}" in said for name in CASES[case][1])
    assert bool(said) == bool(CASES[case][1])


def test_the_docker_engine_says_that_it_has_one_node():
    params = validate({"cluster": {"job": {"train": "pytorchjob", "nodes": 3}}})
    assert containers._not_here(params.cluster.job) == "cluster.job.train=pytorchjob, cluster.job.nodes=3"
    assert containers._pipeline(params)[0]["root"]["inputDefinitions"]["parameters"]["nodes"]["defaultValue"] == 1


def test_the_golden_file_is_of_both():
    assert validate(golden._JOBS).cluster.job.launched == ("tune", "train")
