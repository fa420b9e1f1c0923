"""The container engine without containers: what it makes of commands, specs, labels and folders."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp.local import docker_task_handler
from kfp.local.io import IOStore
from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator

from pipelines import containers, docker_runner, kfp_local, sandbox, sockets
from trainer.config.load import validate
from trainer.errors import MillraceError
from trainer.stage import STAGES


def params(**sections: Any) -> Any:
    return validate(sections, "test")


# What a fixed kfp might look like: the container stays until its exit code is read.
def fixed_upstream(client: Any, image: str, command: Any, volumes: Any, **options: Any) -> int:
    container = client.containers.run(image, command, detach=True, volumes=volumes, auto_remove=False, **options)
    return int(container.wait()["StatusCode"])


def broken_upstream(client: Any, image: str, command: Any, volumes: Any, **options: Any) -> int:
    container = client.containers.run(image, command, detach=True, volumes=volumes, auto_remove=True, **options)
    return int(container.wait()["StatusCode"])


def removing_upstream(client: Any, image: str, command: Any, volumes: Any, remove: bool = True, **options: Any) -> int:
    container = client.containers.run(image, command, detach=True, volumes=volumes, remove=remove, **options)
    return int(container.wait()["StatusCode"])


UPSTREAMS = {
    "fixed": (fixed_upstream, True),
    "auto_remove": (broken_upstream, False),
    "remove": (removing_upstream, False),
    "no source": (print, False),
}


@pytest.mark.parametrize("name", UPSTREAMS)
def test_kfps_own_runner_is_used_as_soon_as_it_keeps_containers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, fixed = UPSTREAMS[name]
    monkeypatch.setattr(docker_task_handler, "run_docker_container", function)
    assert kfp_local.upstream_is_fixed(function) is fixed
    used = []
    with kfp_local.containers_by(lambda function, words: used.append(function) or words["x"]):
        assert docker_task_handler.run_docker_container(x=5) == 5
    assert used == [function if fixed else docker_runner.run_container]
    assert docker_task_handler.run_docker_container is function, "kfp is left as it was found"


def test_this_kfp_is_not_fixed() -> None:
    assert not kfp_local.upstream_is_fixed(docker_task_handler.run_docker_container)


def test_another_kfp_without_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(docker_task_handler, "run_docker_container")
    with pytest.raises(MillraceError, match="in another way"), kfp_local.containers_by(lambda function, words: 0):
        pass


def lost(name: str) -> Any:
    raise LookupError(name)


def test_conditions_find_named_outputs_and_never_take_a_missing_one_for_false() -> None:
    condition = "inputs.parameter_values['pipelinechannel--set-up-go_on'] == 'true'"
    store = IOStore()
    store.put_task_output("set-up", "go_on", "true")
    assert ConditionEvaluator.evaluate_condition(condition, store) is False, "kfp is fixed: drop conditions_found"
    with kfp_local.conditions_found(lost):
        assert ConditionEvaluator.evaluate_condition(condition, store) is True
        store.put_task_output("set-up", "go_on", "false")
        assert ConditionEvaluator.evaluate_condition(condition, store) is False
    missed = []
    with kfp_local.conditions_found(lambda name: missed.append(name) or lost(name)):
        ConditionEvaluator.evaluate_condition(condition, IOStore())
    assert missed == ["set-up-go_on"]


COMMANDS = {
    "a stage": (["python", "-m", "trainer", "train", "--retries", "2", "--executor-input", "{}"], "train"),
    "a python elsewhere": (["/opt/venv/bin/python", "-m", "trainer", "tune"], "tune"),
    "no stage": (["python", "-m", "trainer"], "python"),
    "another program": (["/bin/sh", "-c", "true"], "sh"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_stage_of_a_command(name: str) -> None:
    command, stage = COMMANDS[name]
    assert docker_runner.task_of(command) == docker_runner.Task(stage)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"outputs": 1}', '{"outputs": {"artifacts": {"a": {}}}}'])
def test_an_executor_input_that_is_none_names_no_outputs(text: str) -> None:
    assert docker_runner.task_of(["python", "-m", "trainer", "x", "--executor-input", text]) == docker_runner.Task("x")


def test_outputs_of_a_task() -> None:
    text = (
        '{"outputs": {"artifacts": {"model": {"artifacts": [{"uri": "/r/train/model"}]}},'
        ' "parameters": {"proceed": {"outputFile": "/r/configure/proceed"}}, "outputFile": "/r/o.json"}}'
    )
    task = docker_runner.task_of(["python", "-m", "trainer", "x", "--executor-input", text])
    assert task.outputs == {"model": Path("/r/train/model")}
    assert task.parameters == {"proceed": Path("/r/configure/proceed")}


def test_an_owner_is_dead_only_if_it_was_of_this_machine_and_is_gone() -> None:
    own = docker_runner.owner()
    assert not docker_runner.is_dead(own)
    machine, boot, pid, started = own.split("/")
    assert docker_runner.is_dead(f"{machine}/{boot}/{pid}/{int(started) + 1}"), "another process with the same pid"
    assert docker_runner.is_dead(f"{machine}/earlier-boot/{pid}/{started}")
    assert not docker_runner.is_dead(f"elsewhere/{boot}/{pid}/1"), "of another machine nothing is known"
    for label in ("", "x", f"{machine}", f"{machine}/{boot}/", f"{machine}/{boot}/-1/1"):
        assert not docker_runner.is_dead(label)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    label = docker_runner._owner(child.pid)
    assert not docker_runner.is_dead(label)
    child.communicate(timeout=30)
    assert docker_runner.is_dead(label)


class Engine:
    """An engine that has images by some names."""

    def __init__(self, *tags: str) -> None:
        self.images = self
        self.id = "sha256:1234"
        self.tags = list(tags)
        self.attrs: dict[str, Any] = {"RepoDigests": None}

    def list(self) -> Any:
        return [self]


NAMES = {
    "docker's short form": ("docker.io/millrace/data:1", "millrace/data:1"),
    "podman's long form": ("millrace/data:1", "docker.io/millrace/data:1"),
    "podman's own builds": ("millrace/data:1", "localhost/millrace/data:1"),
    "the very name": ("registry.example:5000/a/data:1", "registry.example:5000/a/data:1"),
    "latest": ("registry.example:5000/a/data", "registry.example:5000/a/data:latest"),
    "an official one": ("python:3.11", "docker.io/library/python:3.11"),
}


def spec_of(*images: str) -> dict[str, Any]:
    return {"deploymentSpec": {"executors": {str(i): {"container": {"image": name}} for i, name in enumerate(images)}}}


@pytest.mark.parametrize("case", NAMES)
def test_images_are_found_by_the_engines_own_names(case: str) -> None:
    asked, known = NAMES[case]
    spec = spec_of(asked)
    assert sandbox.pin_images(Engine(known), spec) == {known: "sha256:1234"}  # type: ignore[arg-type]
    assert spec == spec_of(known)


def test_all_missing_images_are_named_at_once() -> None:
    spec = spec_of("millrace/data:1", "millrace/trainer:1", "millrace/launcher:1")
    with pytest.raises(MillraceError) as caught:
        sandbox.pin_images(Engine("millrace/data:1", "other/trainer:1"), spec)  # type: ignore[arg-type]
    assert "millrace/launcher:1, millrace/trainer:1" in caught.value.message
    assert "make images" in caught.value.hint


def test_nothing_is_retried_by_kfp_and_no_placeholder_is_left_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec, arguments = containers._pipeline(params(cluster={"retries": 3}))
    assert "retryPolicy" not in str(spec)
    assert "_time_utc}}" not in str(spec)
    assert "data/raw/stdlib-functions.jsonl" in str(arguments), "the file that the stage raw writes is what is read"
    assert containers.stages_of(spec) == ["configure", *STAGES, "finish"]


def test_containers_read_what_dvc_watches_and_write_to_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.csv", "data/b.csv", "data/c.txt", "tok/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = params(data={"source": "data/*.csv", "tokenizer": {"path": "../" + tmp_path.name + "/tok/tokenizer.json"}})
    assert sandbox.read_paths(config) == [
        tmp_path / name for name in ("data/a.csv", "data/b.csv", "tok/tokenizer.json")
    ]
    assert sandbox._registry(config) == [tmp_path / "registry"]
    assert (tmp_path / "registry").is_dir()
    assert sandbox._registry(params(promote={"registry": "s3://bucket/r"})) == []


NETWORK = {
    "all here": ({}, False),
    "data": ({"data": {"source": "s3://bucket/rows.csv"}}, True),
    "a repository": ({"data": {"source": "dvc:.@v1:rows.csv"}}, True),
    "registry": ({"promote": {"registry": "gs://bucket/r"}}, True),
    "teacher": ({"distill": {"teachers": ["s3://bucket/t"]}}, True),
    "no distillation": ({"distill": {"enabled": False, "teachers": ["s3://bucket/t"]}}, False),
    "a secret": ({"cluster": {"secrets": {"TOKEN": "a/b"}}}, True),
}


@pytest.mark.parametrize("case", NETWORK)
def test_who_is_given_the_network(case: str) -> None:
    sections, expected = NETWORK[case]
    assert sandbox._needs_network(params(**sections)) is expected


def test_values_of_secrets_are_hidden_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "secret")
    monkeypatch.setenv("B", "secret-and-more")
    monkeypatch.setenv("C", "no")
    values = sandbox.secret_values(params(cluster={"secrets": {"A": "a/b", "B": "a/b", "C": "a/b", "D": "a/b"}}))
    assert values == ["secret-and-more", "secret"]
    assert containers._hidden("\x1b[96mx\x1b[0m no secret-and-more s3://u:pw@h/b", values) == "x no *** s3://***@h/b"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(sockets, "candidates", list)
    monkeypatch.setenv("PATH", "")
    yield
    assert "DOCKER_HOST" not in os.environ


def refusal() -> MillraceError:
    with pytest.raises(MillraceError) as caught, sockets.service():
        pass
    return caught.value


def test_no_engine_at_all_is_an_error_with_the_fix(nowhere: None) -> None:
    error = refusal()
    assert "neither Docker nor podman" in error.message
    assert "DOCKER_HOST" in error.hint


def test_a_socket_that_nobody_serves_is_passed_over(nowhere: None, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    monkeypatch.setattr(sockets, "candidates", lambda: [tmp_path / "not there", path])
    assert "neither Docker nor podman" in refusal().message


def test_podman_that_does_not_start_says_why(nowhere: None, monkeypatch: Any, tmp_path: Path) -> None:
    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\necho cannot do that here >&2\nexit 125\n", encoding="utf-8")
    podman.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cannot do that here" in refusal().message


def test_what_docker_host_names_is_taken_or_refused_never_passed_over(nowhere: None, monkeypatch: Any) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    assert "unix:///nowhere.sock" in refusal().message
    for address in ("ssh://user@elsewhere", "tcp://10.1.2.3:2375"):
        monkeypatch.setenv("DOCKER_HOST", address)
        assert "another machine" in refusal().message
    monkeypatch.delenv("DOCKER_HOST")


def test_folders_are_lent_to_the_containers_and_given_back(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root lends folders")
    outside = tmp_path / "outside"
    outside.touch()
    lent = tmp_path / "lent"
    (lent / "deep").mkdir(parents=True)
    (lent / "deep" / "file").touch()
    (lent / "link").symlink_to(outside)
    with sandbox._given([lent], 65532, 65532):
        assert {path.lstat().st_uid for path in (lent, *lent.rglob("*"))} == {65532}
        assert outside.stat().st_uid == 0, "a link is not followed"
    assert {path.lstat().st_uid for path in (lent, *lent.rglob("*"))} == {0}
