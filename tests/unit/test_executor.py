"""`--executor-input`: what the Kubeflow backend gives and what local runs give, and what each must get back.

The ExecutorInput texts are those that a real KFP 2.17 backend and kfp.local pass, with only the paths changed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from trainer import executor
from trainer.artifacts import manifest
from trainer.errors import ArtifactError, ConfigError, GateRefused, StorageError
from trainer.executor import local_artifact, parameters

PREFIX = "mlpipeline/v2/artifacts/training/0d3c/preprocess/7b1e"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toy.register(monkeypatch)
    monkeypatch.delenv("TOY", raising=False)


def backend(root: Path, **values) -> dict:
    """As the backend's launcher gives it: URIs of the object store, numbered inputs without schemaTitle, executor-logs."""

    def output(name, title):
        kind = {"schemaTitle": title, "schemaVersion": "0.0.1"}
        return {"artifacts": [{"name": name, "type": kind, "uri": f"minio://{PREFIX}/{name}"}]}

    source = {
        "name": "17", "type": {"instanceSchema": ""}, "uri": f"minio://{PREFIX}/source",
        "metadata": {"display_name": "source", "store_session_info": '{"Provider":"minio"}', "digest": "x"},
    }  # fmt: skip
    return {
        "inputs": {"parameterValues": values, "artifacts": {"source": {"artifacts": [source]}}},
        "outputs": {
            "parameters": {"count": {"outputFile": "/tmp/kfp/outputs/count"}},
            "artifacts": {
                "made": output("made", "system.Model"),
                "notes": output("notes", "system.Artifact"),
                "executor-logs": output("executor-logs", "system.Artifact"),
            },
            "outputFile": f"{root}/minio/{PREFIX}/output_metadata.json",
        },
    }


def local(root: Path, **values) -> dict:
    """As kfp.local gives it: paths for URIs, folders that do not exist, another name of the output file."""

    def artifact(name, place, title):
        kind = {"schemaTitle": title, "schemaVersion": "0.0.1"}
        return {"artifacts": [{"name": name, "type": kind, "uri": f"{root}/{place}", "metadata": {}}]}

    return {
        "inputs": {"parameterValues": values, "artifacts": {"source": artifact("source", "previous/source", "system.Dataset")}},
        "outputs": {
            "artifacts": {
                "made": artifact("made", "toy/made", "system.Model"),
                "notes": artifact("notes", "toy/notes", "system.Artifact"),
            },
            "outputFile": f"{root}/toy/executor_output.json",
        },
    }  # fmt: skip


@pytest.fixture(params=[backend, local], ids=["backend", "local"])
def dialect(request, tmp_path, monkeypatch):
    """(function that makes the ExecutorInput, folder of the source, folder of the output `made`)."""
    monkeypatch.setattr(executor, "_MOUNTS", {"minio://": f"{tmp_path}/minio/"})
    if request.param is backend:
        place = tmp_path / "minio" / PREFIX
        toy.make(place / "source")
        return lambda **values: backend(tmp_path, **values), place / "source", place / "made"
    toy.make(tmp_path / "previous/source")
    return lambda **values: local(tmp_path, **values), tmp_path / "previous/source", tmp_path / "toy/made"


def run(given, *overrides):
    status = executor.run("toy", json.dumps(given), overrides)
    return status, json.loads(Path(given["outputs"]["outputFile"]).read_text())


def test_outputs_and_metadata_are_written_where_the_input_says(dialect):
    make, source, made = dialect
    given = make(train_params='{"lr": 0.5, "epochs": 2}', data_params='{"text": "a b"}', tune_params="{}")
    status, output = run(given)
    assert status == 0
    found = manifest.read(made, "model")
    assert found.record["params"]["train"] | {"lr": 0.5, "epochs": 2} == found.record["params"]["train"]
    assert found.record["params"]["data"]["text"] == "a b"
    assert found.record["inputs"]["source"] == manifest.read(source).digest
    assert set(output) == {"artifacts"}
    assert set(output["artifacts"]) == {"made", "notes"}
    (entry,) = output["artifacts"]["made"]["artifacts"]
    asked = given["outputs"]["artifacts"]["made"]["artifacts"][0]
    assert (entry["name"], entry["uri"], entry["type"]) == (asked["name"], asked["uri"], asked["type"])
    assert set(entry) == {"name", "uri", "type", "metadata"}
    assert entry["metadata"] == {"digest": found.digest, "data_version": "d41d8", "accuracy": 0.5}


def test_metadata_is_flat_and_has_no_null_and_no_infinity(dialect):
    make, _, _ = dialect
    _, output = run(make())
    for listed in output["artifacts"].values():
        for entry in listed["artifacts"]:
            for name, value in entry["metadata"].items():
                assert isinstance(name, str)
                assert type(value) in (str, float, int)
                json.dumps(value, allow_nan=False)


def test_a_refusing_gate_is_written_and_raised(dialect, monkeypatch):
    make, _, made = dialect
    monkeypatch.setenv("TOY", "refuse")
    given = make()
    with pytest.raises(GateRefused):
        run(given)
    output = json.loads(Path(given["outputs"]["outputFile"]).read_text())
    assert output["artifacts"]["made"]["artifacts"][0]["metadata"]["accuracy"] == 0.5
    manifest.read(made, "model")


def test_an_optional_input_may_be_absent_or_empty(dialect):
    make, _, _ = dialect
    given = make()
    given["inputs"]["artifacts"]["extra"] = {"artifacts": []}
    assert run(given)[0] == 0
    given["inputs"]["artifacts"]["extra"] = {}
    assert run(given)[0] == 0


def test_a_retried_task_writes_over_its_own_outputs(dialect):
    make, _, made = dialect
    given = make()
    run(given)
    digest = manifest.read(made).digest
    run(given)
    assert manifest.read(made).digest == digest


def test_nothing_is_written_when_the_stage_fails(dialect, monkeypatch):
    make, _, made = dialect
    monkeypatch.setenv("TOY", "fail")
    given = make()
    with pytest.raises(ValueError, match=r"rows\.csv"):
        run(given)
    assert not made.exists()
    assert not Path(given["outputs"]["outputFile"]).exists()


def test_a_missing_input_is_refused(dialect):
    make, _, _ = dialect
    given = make()
    del given["inputs"]["artifacts"]
    with pytest.raises(ConfigError, match="--in source=URI is missing"):
        run(given)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("minio://mlpipeline/v2/x", "/minio/mlpipeline/v2/x"),
        ("s3://bucket/x", "/s3/bucket/x"),
        ("gs://bucket/x", "/gcs/bucket/x"),
        ("oci://registry.example/team/model:v1", "/oci/registry.example_team_model:v1/models"),
        ("/local/outputs/x", "/local/outputs/x"),
        ("abfs://c@a.dfs.core.windows.net/x", "abfs://c@a.dfs.core.windows.net/x"),
    ],
)
def test_uris_are_mapped_to_where_kfp_mounts_them(uri, path):
    assert local_artifact(uri) == path


def given_values(**values):
    return json.dumps({"inputs": {"parameterValues": values}, "outputs": {}})


PARAMETERS = {
    "none": ({}, [], {}),
    "empty": ({"train_params": ""}, [], {}),
    "null": ({"train_params": None}, [], {}),
    "comment": ({"train_params": "# nothing"}, [], {}),
    "YAML": ({"train_params": "lr: 1e-2"}, [], {"lr": 0.01}),
    "JSON": ({"train_params": '{"lr": 0.01}'}, [], {"lr": 0.01}),
    "a structure": ({"train_params": {"lr": 0.01, "epochs": 3.0}}, [], {"lr": 0.01, "epochs": 3}),
    "of no section": ({"store": "", "data_version": "x", "trial_params": "1"}, [], {}),
    "the command line wins": ({"train_params": "{lr: 1}"}, ["train.lr=3"], {"lr": 3}),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters(case):
    values, overrides, expected = PARAMETERS[case]
    train = parameters(given_values(**values), overrides).train
    assert {name: getattr(train, name) for name in expected} == expected


@pytest.mark.parametrize("value", ["[1]", "train", [1], 3, "{lr: [", "{lrr: 1}", '{"lr": "x"}'])
def test_wrong_parameters_are_refused(value):
    with pytest.raises(ConfigError, match=r"parameter train_params|train\."):
        parameters(given_values(train_params=value), [])


def test_a_section_and_an_artifact_may_share_a_name(dialect):
    make, _, _ = dialect
    given = make(model_params='{"name": "ngram"}')
    given["inputs"]["artifacts"]["model"] = {"artifacts": [{"name": "3", "uri": "minio://x/y"}]}
    assert run(given)[0] == 0


def test_outputs_go_to_the_store_by_reference_and_come_back(dialect, tmp_path):
    make, _, made = dialect
    store = tmp_path / "store"
    given = make(store=str(store))
    _, output = run(given)
    assert [path.name for path in made.iterdir()] == [executor.REFERENCE], "nothing large goes through KFP"
    place = executor.dereference(str(made))
    assert place.startswith(str(store))
    found = manifest.read(place, "model")
    assert output["artifacts"]["made"]["artifacts"][0]["metadata"]["digest"] == found.digest
    # What one task left by reference, another one takes as its input.
    shutil.copytree(made, tmp_path / "downloaded")
    given = make(store=str(tmp_path / "other"))
    given["inputs"]["artifacts"]["extra"] = {"artifacts": [{"name": "5", "uri": str(tmp_path / "downloaded")}]}
    run(given)
    record = manifest.read(executor.dereference(str(made)), "model").record
    assert record["inputs"]["extra"] == found.digest


def test_a_store_far_away_is_used_by_reference_too(dialect, tmp_path):
    import fsspec

    make, _, made = dialect
    store = f"memory://{tmp_path}/runs"
    run(make(store=f"{store}/"))
    place = executor.dereference(str(made))
    assert place.startswith(f"{store}/")
    assert "//" not in place.removeprefix("memory://")
    shutil.copytree(made, tmp_path / "downloaded")
    given = make(store=f"{store}-2")
    given["inputs"]["artifacts"]["extra"] = {"artifacts": [{"name": "5", "uri": str(tmp_path / "downloaded")}]}
    digest = json.loads((made / executor.REFERENCE).read_text())["digest"]
    run(given)
    folder = executor.dereference(str(made)).removeprefix("memory://")
    assert json.loads(fsspec.filesystem("memory").cat(f"{folder}/manifest.json"))["record"]["inputs"]["extra"] == digest
    fsspec.filesystem("memory").rm(place.removeprefix("memory://"), recursive=True)
    with pytest.raises(StorageError, match="not there any more"):
        executor.dereference(str(tmp_path / "downloaded"))


def test_a_lost_attempts_scratch_in_a_mounted_store_is_its_own_runs(tmp_path, monkeypatch):
    toy.make(tmp_path / "previous/source")
    notes = {}

    def attempt(run_id, todo):
        monkeypatch.setenv("TOY", todo)
        given = local(tmp_path, store=str(tmp_path / "store"))
        for port, listed in given["outputs"]["artifacts"].items():
            listed["artifacts"][0]["uri"] = f"{tmp_path}/root/{run_id}/toy/{port}"
        if todo == "fail":
            with pytest.raises(ValueError, match=r"rows\.csv"):
                executor.run("toy", json.dumps(given), [])
        else:
            executor.run("toy", json.dumps(given), [])
            notes[run_id] = Path(
                executor.dereference(f"{tmp_path}/root/{run_id}/toy/notes"), "attempts.txt"
            ).read_text()

    attempt("run-1", "fail")
    attempt("run-2", "write")
    attempt("run-1", "write")
    assert notes == {"run-1": "xx", "run-2": "x"}
    assert [path.name for path in (tmp_path / "store").rglob(".scratch")] == []


def test_two_tasks_never_share_a_place_in_the_store(tmp_path):
    places = set()
    for task in ("one", "two"):
        uri = f"minio://mlpipeline/v2/artifacts/training/run-1/{task}/7b1e/made"
        given = {"inputs": {"parameterValues": {"store": "s3://b/p/"}},
                 "outputs": {"artifacts": {"made": {"artifacts": [{"uri": uri}]}}, "outputFile": "x"}}  # fmt: skip
        places.add(executor.place(executor.read(json.dumps(given)), "made"))
    assert places == {"s3://b/p/run-1/one/7b1e/made", "s3://b/p/run-1/two/7b1e/made"}


def test_a_reference_to_what_is_gone_or_replaced_is_refused(tmp_path):
    digest = manifest.read(toy.make(tmp_path / "store")).digest
    executor.refer(str(tmp_path / "ref"), str(tmp_path / "store"), digest)
    assert executor.dereference(str(tmp_path / "ref")) == str(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StorageError, match="not there any more"):
        executor.dereference(str(tmp_path / "ref"))
    toy.make(tmp_path / "store", files={"other": b"x"})
    with pytest.raises(ArtifactError, match="another artifact"):
        executor.dereference(str(tmp_path / "ref"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"uri"', b"\xff", b'{"uri": "x"}'])
def test_a_broken_reference_names_itself(content, tmp_path):
    (tmp_path / executor.REFERENCE).write_bytes(content)
    with pytest.raises(StorageError, match=r"reference\.json"):
        executor.dereference(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "{{$}}", "[]", "null", "3", '"x"', "{}", '{"outputs": {}}', '{"outputs": []}', '{"outputs": {"outputFile": 3}}',
     "[" * 100_000,
     '{"inputs": [], "outputs": {"outputFile": "x"}}', '{"inputs": {"parameterValues": [1]}, "outputs": {"outputFile": "x"}}',
     '{"inputs": {"artifacts": {"source": {"artifacts": [{}]}}}, "outputs": {"outputFile": "x"}}',
     '{"inputs": {"artifacts": {"source": 1}}, "outputs": {"outputFile": "x"}}'],
)  # fmt: skip
def test_what_is_no_executor_input_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, StorageError)) as caught:
        executor.run("toy", text, [])
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_entry_point_takes_an_executor_input(tmp_path):
    toy.make(tmp_path / "previous/source")
    command = [
        sys.executable,
        "-m",
        "tests.toy",
        "toy",
        "--executor-input",
        json.dumps(local(tmp_path, train_params="lr: 0.5")),
    ]
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [*command, "--print-config"], capture_output=True, text=True, timeout=60, cwd=root, check=True
    )
    assert "lr: 0.5" in shown.stdout
    assert not (tmp_path / "toy").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy/executor_output.json").is_file()


def test_the_run_is_known_by_the_backends_uris_alone(dialect):
    # It cannot be a parameter: the backend would have it in its cache key.
    make, source, _ = dialect
    found = executor.read(json.dumps(make()))
    assert found.run == ("0d3c" if "minio" in str(source) else "")
    assert executor.read('{"outputs": {"outputFile": "x"}}').run == ""
