"""The laptop's graph (dvc.yaml) and the cluster's (the compiled pipeline) are one: stages, edges, commands, parameters."""

import functools
import shlex
from dataclasses import dataclass, field

import pytest

from components.build import RUN_FORM
from components.table import TASKS
from pipelines import compiler, dvcfile, golden
from trainer import presets
from trainer.config import Params
from trainer.config.load import validate
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError
from trainer.stage import STAGES

AROUND = {"configure", "finish"}


@dataclass
class Node:
    command: list[str] = field(default_factory=list)
    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    sections: set[str] = field(default_factory=set)


def default() -> Params:
    return validate(parse_yaml(presets.text(presets.DEFAULT), ""))


@functools.cache
def documents() -> tuple[dict, dict]:
    spec, platform = compiler.package(default())
    return spec, platform


def tasks() -> dict[str, dict]:
    """Task name -> its task spec, out of all nested graphs; groups of tasks are left out."""
    spec = documents()[0]
    found = {}
    for component in [spec["root"], *spec["components"].values()]:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                found[name] = task
    return found


def container(name: str) -> dict:
    return documents()[0]["deploymentSpec"]["executors"][f"exec-{name}"]["container"]


def definition(name: str) -> dict:
    return documents()[0]["components"][f"comp-{name}"]


def source(value: dict) -> str:
    """`TASK/KEY` of what a task takes from another one; inputs of its group are followed to where they come from."""
    if "componentInputParameter" in value:
        return "/".join(value["componentInputParameter"].removeprefix("pipelinechannel--").split("-", 1))
    content = value.get("taskOutputArtifact") or value["taskOutputParameter"]
    return f"{content['producerTask']}/{content.get('outputArtifactKey') or content['outputParameterKey']}"


def of_dvc() -> dict[str, Node]:
    nodes = {}
    for name, stage in dvcfile.build(default())["stages"].items():
        if name == "raw":
            continue
        words = shlex.split(stage["cmd"])
        flags = {word for word in words if word.startswith("--")} - {"--params", "--in", "--out"}
        folders = {dep.removeprefix("out/") for dep in stage.get("deps", []) if dep.startswith("out/")}
        outs = {(next(iter(out)) if isinstance(out, dict) else out).removeprefix("out/") for out in stage["outs"]}
        nodes[name] = Node([*words[:4], *sorted(flags)], folders, outs, set(stage["params"]))
    return nodes


def of_kfp() -> dict[str, Node]:
    nodes = {}
    for name, task in tasks().items():
        if name in AROUND:
            continue
        words = [*container(name)["command"], *container(name)["args"]]
        flags = {word for word in words if word.startswith("--")} - {"--retries", "--backoff", "--executor-input"}
        artifacts = task["inputs"].get("artifacts", {})
        for port, value in artifacts.items():
            producer, key = source(value).split("/")
            assert key == port, "an artifact has the same name wherever it goes"
            assert key in STAGES[producer].outputs
        sections = set()
        for key, value in task["inputs"]["parameters"].items():
            if key.endswith("_params") and not key.startswith("pipelinechannel"):
                assert source(value) == f"configure/{key}"
                sections.add(key.removesuffix("_params"))
        outputs = set(definition(name)["outputDefinitions"]["artifacts"]) - set(TASKS[name].views)
        nodes[name] = Node([*words[:4], *sorted(flags)], set(artifacts), outputs, sections)
    return nodes


def test_both_graphs_are_the_stage_table():
    dvc, kfp = of_dvc(), of_kfp()
    assert dvc == kfp
    assert list(dvc) == list(STAGES)
    assert all(node.inputs == set(STAGES[name].inputs) for name, node in kfp.items())


@pytest.mark.parametrize("change", ["a stage", "an edge", "a section", "a flag"])
def test_a_difference_is_seen(change, monkeypatch):
    found = of_kfp()
    if change == "a stage":
        del found["distill"]
    elif change == "an edge":
        found["train"].inputs.discard("tuning")
    elif change == "a section":
        found["train"].sections.add("tune")
    else:
        found["promote"].command.pop()
    assert found != of_dvc()


def test_the_run_form_is_what_configure_takes():
    inputs = documents()[0]["root"]["inputDefinitions"]["parameters"]
    assert set(inputs) == set(RUN_FORM)
    for name, (_, value, text) in RUN_FORM.items():
        assert inputs[name]["defaultValue"] == value
        assert inputs[name]["description"] == text
    taken = tasks()["configure"]["inputs"]["parameters"]
    assert {key: source(taken[key]) for key in RUN_FORM} == {key: key for key in RUN_FORM}
    assert "schedule_time" in taken["scheduled_at"]["runtimeValue"]["constant"]


def test_the_data_version_is_in_every_cache_key():
    for name in of_kfp():
        value = tasks()[name]["inputs"]["parameters"]["data_version"]
        assert source(value) == "configure/data_version"


def test_caching_is_decided_for_each_task():
    cached = {name for name, task in tasks().items() if task["cachingOptions"].get("enableCache")}
    assert cached == {"preprocess", "tune", "train", "distill", "quantize"}, (
        "the others read what is no input of theirs"
    )


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_restricted_described_and_bounded(name):
    _, platform = documents()
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]
    assert kubernetes["securityContext"] == {"runAsUser": "65532", "runAsGroup": "65532", "runAsNonRoot": True}
    assert {"mountPath": "/tmp", "volumeName": "tmp"} in kubernetes["emptyDirMounts"]
    resources = container(name)["resources"]
    assert resources["resourceCpuRequest"]
    assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"]
    assert tasks()[name]["retryPolicy"]["maxRetryCount"] == 2
    assert container(name)["image"].startswith(f"docker.io/millrace/{TASKS[name].image}:")
    assert "latest" not in container(name)["image"]
    for kind in ("inputDefinitions", "outputDefinitions"):
        for ports in definition(name).get(kind, {}).values():
            silent = [key for key, port in ports.items() if kind == "inputDefinitions" and key != "status"
                      and not port.get("description")]  # fmt: skip
            assert not silent


def test_a_configuration_longer_than_a_command_line_is_refused_here():
    # A container that is given more does not even start, and says so nowhere that people look.
    space = {"train.optimizer": {"type": "categorical", "choices": ["adamw", "sgd"] * 10_000}}
    with pytest.raises(ConfigError, match=r"params\.yaml.*98,304"):
        compiler.arguments(validate({"tune": {"space": space}}))


@pytest.mark.parametrize(("section", "key"), [("data", "source"), ("promote", "registry")])
def test_a_secret_in_a_uri_does_not_leave_this_machine(section, key):
    with pytest.raises(ConfigError, match=rf"{section}\.{key}") as caught:
        compiler.arguments(validate({section: {key: "https://me:hunter2canary@host.example/x.csv"}}))
    assert "hunter2canary" not in str(caught.value)


def test_a_host_that_knows_no_security_context_is_told_of_none():
    # The api-server of 2.15 refuses fields of the platform spec that it does not know.
    platform = compiler.package(validate({"cluster": {"security_context": False}}))[1]
    assert "securityContext" not in str(platform)
    assert "emptyDirMounts" in str(platform)


def test_only_what_trains_gets_accelerators():
    accelerated = {name for name in TASKS if "accelerator" in container(name)["resources"]}
    assert accelerated == {"tune", "train", "distill"}
    for name in accelerated:
        channel = f"pipelinechannel--configure-{name}_gpus"
        assert (
            container(name)["resources"]["accelerator"]["resourceCount"] == f"{{{{$.inputs.parameters['{channel}']}}}}"
        )
        assert channel in tasks()[name]["inputs"]["parameters"], "the backend resolves it there"


def test_secrets_are_references(tmp_path):
    params = validate(golden._FULL)
    text = compiler.text(params)
    assert "object-store" in text
    _, platform = compiler.package(params)
    for name in TASKS:
        executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]
        (secret,) = executor["secretAsEnv"]
        assert secret["secretName"] == "object-store"
        assert secret["keyToEnv"] == [{"envVar": "AWS_ACCESS_KEY_ID", "secretKey": "access-key"}]
        assert executor["pvcMount"][0]["mountPath"] == "/data"


def test_exit_handler_runs_whatever_became_of_the_chain():
    policy = tasks()["finish"]["triggerPolicy"]
    assert policy["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert set(TASKS) - set(tasks()) == set()
    assert [name for name, task in documents()[0]["root"]["dag"]["tasks"].items() if name != "finish"] == [
        "exit-handler-1"
    ]


def test_golden_files_are_up_to_date(root, monkeypatch):
    monkeypatch.chdir(root)
    assert golden.changes(golden.render()) == []


def test_arguments_carry_the_whole_configuration():
    from trainer import configure

    params = validate(
        {"train": {"epochs": 5}, "data": {"source": "x.csv"}, "promote": {"model": "m"}, "cluster": {"retries": 0}}
    )
    found = configure.resolve(compiler.arguments(params))
    assert found.model_dump(exclude={"cluster"}) == params.model_dump(exclude={"cluster"})
    inputs = compiler.spec(params)["root"]["inputDefinitions"]["parameters"]
    assert {key: inputs[key]["defaultValue"] for key in ("preset", "params")} == compiler.arguments(params)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_carried_by_its_name(name):
    params = validate(parse_yaml(presets.text(name), name) | {"cluster": {"retries": 0}})
    assert compiler.arguments(params) == {"preset": name, "params": ""}
