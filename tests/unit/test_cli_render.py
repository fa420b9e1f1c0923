"""`millrace render`: the kinds, where artifacts are, and what is refused. Runs `main` in this process, in a folder of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.launch.security import pod_specs
from pipelines import kube_yaml
from pipelines.cli import main
from pipelines.cli_render import KINDS


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rendered(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["render", *words]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    try:
        code = main(["render", *words])
    except SystemExit as error:
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith(("error: ", "usage: "))
    assert "fix: " in err
    return err


def args_of(objects: list[dict[str, Any]]) -> list[str]:
    if objects[-1]["kind"] == "TrainJob":
        return list(objects[-1]["spec"]["trainer"]["args"])
    return [word for obj in objects for pod in pod_specs(obj) for word in pod["containers"][0]["args"]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pipeline"])
def test_artifacts_lie_in_the_claim_or_the_store_or_where_they_are_said_to_lie(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    off = "tune.pruner=none"
    assert "dataset=/mnt/millrace/dataset" in args_of(rendered(capsys, kind, off, "cluster.claim=c"))
    assert "dataset=s3://b/run/dataset" in args_of(rendered(capsys, kind, off, "cluster.store=s3://b/run/"))
    words = args_of(rendered(capsys, kind, off, "--in", "dataset=s3://b/other", "cluster.store=s3://b/run"))
    assert "dataset=s3://b/other" in words
    assert ("model=s3://b/run/model" in words) == (kind != "experiment")
    assert refused(capsys, kind, off).startswith("error: cluster.store: nothing says where")


def test_an_optional_input_is_read_where_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = args_of(rendered(capsys, "pytorchjob", "cluster.claim=c"))
    assert not any(word.startswith("tuning=") for word in words)
    assert "tuning=/t" in args_of(rendered(capsys, "pytorchjob", "cluster.claim=c", "--in", "tuning=/t"))


def test_name_namespace_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["job", "--stage", "preprocess", "--name", "clean", "--namespace", "team", "cluster.claim=c"]
    (obj,) = rendered(capsys, *words)
    assert obj["metadata"]["name"] == "clean"
    assert obj["metadata"]["namespace"] == "team"
    assert args_of([obj])[0] == "preprocess"
    assert "namespace" not in rendered(capsys, "job", "cluster.claim=c")[0]["metadata"]


def test_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "trainjob", "-o", "job.yaml", "cluster.claim=c"]) == 0
    assert capsys.readouterr().out == ""
    kinds = [obj["kind"] for obj in yaml.safe_load_all(Path("job.yaml").read_text(encoding="utf-8"))]
    assert kinds == ["TrainingRuntime", "TrainJob"]


def test_the_pipeline_is_what_compile_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "pipeline"]) == 0
    shown = capsys.readouterr().out
    assert main(["compile", "-o", "-"]) == 0
    assert capsys.readouterr().out == shown


def test_a_master_with_workers_needs_a_namespace_that_lets_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pytorchjob", "cluster.claim=c", "cluster.job.master=true", "cluster.job.nodes=2"]
    assert "error: cluster.job.master: " in refused(capsys, *words)
    (obj,) = rendered(capsys, *words, "--pod-security", "baseline")
    assert set(obj["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}


WRONG = {
    "kind": (["pytorchjb"], "did you mean 'pytorchjob'"),
    "stage": (["job", "--stage", "trian"], "did you mean 'train'"),
    "stage of another kind": (
        ["pytorchjob", "--stage", "tune", "cluster.claim=c"],
        "--stage tune: pytorchjob is of stage train",
    ),
    "port": (["pytorchjob", "--in", "datset=/d"], "did you mean 'dataset'"),
    "no address": (["pytorchjob", "--in", "dataset="], "must be NAME=URI"),
    "key": (["pytorchjob", "cluster.job.node=2"], "did you mean 'nodes'"),
    "name": (["pytorchjob", "--name", "My_Job", "cluster.claim=c"], "--name: "),
    "long name": (["experiment", "--name", "a" * 41, "cluster.claim=c"], "more than 40"),
    "space in an address": (["experiment", "--in", "dataset=s3://b/a b"], "through a shell"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = WRONG[name]
    assert said in refused(capsys, *words)


def test_texts_that_kubectl_would_take_for_numbers_are_quoted() -> None:
    texts = [
        "71e59324",
        "1_000",
        "0x1f",
        "007",
        "1:30",
        ".5",
        "-1",
        "true",
        "no",
        "null",
        "~",
        "",
        "--in",
        "a: b",
        "# x",
    ]
    shown = kube_yaml.documents([{"texts": texts}])
    assert yaml.safe_load(shown) == {"texts": texts}
    for text in texts[:9]:
        assert f"'{text}'" in shown


def test_the_environment_survives_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    (obj,) = rendered(capsys, "pytorchjob", "cluster.claim=c", "train.lr=0.5")
    env = {each["name"]: each.get("value") for pod in pod_specs(obj) for each in pod["containers"][0]["env"]}
    assert json.loads(env["MILLRACE_PARAMS"])["train"]["lr"] == 0.5


def test_checkpoints_of_a_model_in_an_object_store_are_on_the_claim(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("cluster.store=s3://bucket/runs", "cluster.claim=shared")
    for kind in ("job", "pytorchjob", "trainjob"):
        args = args_of(rendered(capsys, kind, *words, *(("--stage", "train") if kind == "job" else ())))
        assert args[args.index("--scratch") + 1] == "/mnt/millrace/scratch/millrace-train"
