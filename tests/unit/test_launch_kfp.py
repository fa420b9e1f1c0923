"""A step of Kubeflow Pipelines that launches: what its ExecutorInput asks for, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.launch import __main__ as launch_main
from components.launch import kfp, stages
from components.launch.asked import Asked, small_files
from trainer import executor
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.errors import ConfigError


def artifact(folder: Path, kind: str, **record: Any) -> manifest.Manifest:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    return manifest.seal(folder, kind, {}, record, ())


def given(folder: Path, **values: Any) -> str:
    def port(name: str) -> dict[str, Any]:
        return {
            "artifacts": [
                {"name": name, "type": {"schemaTitle": "system.Model"}, "uri": str(folder / "kfp" / "task" / name)}
            ]
        }

    cluster = {"claim": "data", "mount": str(folder / "mnt"), "job": {"train": "pytorchjob"}}
    parameters = {
        "cluster_params": json.dumps(cluster),
        "store": f"{folder}/mnt/runs",
        "nodes": "2",
        "gpus": "0",
        **values,
    }
    return json.dumps(
        {
            "inputs": {"parameterValues": parameters, "artifacts": {"dataset": port("dataset")}},
            "outputs": {"artifacts": {"model": port("model")}, "outputFile": str(folder / "output.json")},
        }
    )


def test_inputs_are_where_their_references_say_and_outputs_go_to_the_store(tmp_path: Path) -> None:
    made = artifact(tmp_path / "mnt" / "dataset", "dataset")
    executor.refer(str(tmp_path / "kfp" / "task" / "dataset"), str(tmp_path / "mnt" / "dataset"), made.digest)
    text = given(tmp_path)
    asked = kfp.read("train", executor.read(text), text, [])
    assert asked.inputs == {"dataset": str(tmp_path / "mnt" / "dataset")}
    assert asked.outputs["model"].startswith(f"{tmp_path}/mnt/runs/")
    assert (asked.nodes, asked.gpus) == (2, 0)
    stages.check(asked)
    job, _ = stages.training(asked, "team", {"dataset": made.digest})
    assert job.nodes == 2
    assert f"dataset={tmp_path}/mnt/dataset" in job.args


def test_a_model_whose_size_is_searched_is_not_judged_by_the_size_that_is_not_taken(tmp_path: Path) -> None:
    made = artifact(tmp_path / "mnt" / "dataset", "dataset")
    executor.refer(str(tmp_path / "kfp" / "task" / "dataset"), str(tmp_path / "mnt" / "dataset"), made.digest)
    model = {"name": "decoder", "layers": 1}
    sections = {"task_params": {"name": "lm"}, "model_params": model, "parallel_params": {"pp": 2}}
    values = {name: json.dumps(tree) for name, tree in sections.items()}
    search = {"enabled": True, "space": {"model.layers": {"type": "int", "low": 2, "high": 4}}}

    def job(**more: str) -> Any:
        text = given(tmp_path, **values, **more)
        asked = kfp.read("train", executor.read(text), text, [])
        return stages.training(asked, "team", {"dataset": made.digest})[0]

    assert job(tune_params=json.dumps(search)).nodes == 2
    with pytest.raises(ConfigError, match=r"parallel\.pp: 2 stages, but the model has 1 block"):
        job()


@pytest.mark.parametrize("nodes", ["two", "0", "-1"])
def test_nodes_that_are_none_are_refused(tmp_path: Path, nodes: str) -> None:
    text = given(tmp_path, nodes=nodes)
    (tmp_path / "kfp" / "task" / "dataset").mkdir(parents=True)
    with pytest.raises(ConfigError, match="parameter nodes"):
        kfp.read("train", executor.read(text), text, [])


def test_artifacts_that_go_through_kfp_itself_are_refused_and_store_is_named() -> None:
    asked = Asked("train", load(None, []), {"dataset": "/minio/a/dataset"}, {"model": "/minio/a/model"})
    with pytest.raises(ConfigError, match="store"):
        stages.check(asked)


def test_a_search_whose_result_could_not_be_written_is_refused_before_hours_of_it(tmp_path: Path) -> None:
    mount = tmp_path / "mnt"
    params = load(None, ["cluster.claim=data", f"cluster.mount={mount}", "cluster.job.tune=experiment"])
    asked = Asked("tune", params, {"dataset": f"{mount}/dataset"}, {"tuning": f"{mount}/tuning"})
    with pytest.raises(ConfigError, match="claim data is not mounted here"):
        stages.check(asked)
    mount.mkdir()
    stages.check(asked)


def test_a_parameter_is_no_word_of_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        launch_main.parse_args(["clean", "--run", "r", "train.lr=1"])
    assert end.value.code == 2
    assert "clean takes no parameters" in capsys.readouterr().err


def test_a_job_of_other_inputs_is_another_one() -> None:
    asked = Asked("train", load(None, []), {"dataset": "s3://b/dataset"}, {"model": "s3://b/model"})
    made = [stages.training(asked, "team", {"dataset": digest})[1][-1]["metadata"] for digest in ("1", "2")]
    assert made[0]["name"] == made[1]["name"]
    assert made[0]["annotations"] != made[1]["annotations"]


def test_the_executor_output_refers_to_what_the_job_made(tmp_path: Path) -> None:
    artifact(tmp_path / "mnt" / "dataset", "dataset")
    text = given(tmp_path)
    read = executor.read(text)
    place = executor.place(read, "model")
    made = artifact(Path(place), "model", metrics={"val_accuracy": 0.9, "val_loss": None})
    asked = Asked("train", load(None, []), {"dataset": str(tmp_path / "mnt" / "dataset")}, {"model": place})
    kfp.tell(read, asked)
    output = json.loads((tmp_path / "output.json").read_text())
    metadata = output["artifacts"]["model"]["artifacts"][0]["metadata"]
    assert metadata["val_accuracy"] == 0.9
    assert "val_loss" not in metadata
    reference = json.loads((tmp_path / "kfp" / "task" / "model" / executor.REFERENCE).read_text())
    assert reference == {"uri": place, "digest": made.digest}


def test_of_a_remote_artifact_only_the_small_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(5_000_000))
    (folder / "metrics.json").write_text("{}")
    manifest.seal(folder, "model", {}, {}, ())
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/launch-kfp/model/{path.name}", path.read_bytes())
    found = small_files("memory://launch-kfp/model", tmp_path / "here")
    assert sorted(path.name for path in found.iterdir()) == ["manifest.json", "metrics.json"]
