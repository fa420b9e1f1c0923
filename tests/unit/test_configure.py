"""The first task of a run: what the run form may say, what comes out of it, and when there is nothing new."""

import json
from pathlib import Path

import pytest

from trainer import configure, executor, presets
from trainer.artifacts import manifest
from trainer.config import Params
from trainer.data.sources import resolve
from trainer.errors import ConfigError, DataError, StorageError
from trainer.registry import Registry

ROWS = "text,label\n" + "".join(f"a text of topic {n % 3} number {n},topic {n % 3}\n" for n in range(60))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


def given(folder: Path, **values) -> str:
    """As the backend gives it, whole numbers as floats."""
    return json.dumps({
        "inputs": {"parameterValues": {"preset": "" if values.get("params") else "text-classify", "trials": 0.0,
                                       "nodes": 1.0, **values}},
        "outputs": {
            "parameters": {"proceed": {"outputFile": "/tmp/kfp/outputs/proceed"}},
            "artifacts": {"summary": {"artifacts": [{"name": "summary", "type": {"schemaTitle": "system.Markdown"},
                                                     "uri": f"{folder}/summary"}]}},
            "outputFile": f"{folder}/output.json",
        },
    })  # fmt: skip


def run(folder: Path, **values) -> dict:
    assert configure.run(given(folder, **values), []) == 0
    return json.loads((folder / "output.json").read_text())["parameterValues"]


def test_every_section_comes_out_and_goes_into_a_stage_as_it_was(data, tmp_path):
    found = run(tmp_path, data=str(data), overrides="train.epochs=3 tune.enabled=false")
    expected = configure.resolve({"data": str(data)})
    text = json.dumps({"inputs": {"parameterValues": found}, "outputs": {}})
    params = executor.parameters(text, [])
    assert params.train.epochs == 3
    assert not params.tune.enabled
    assert params.model == expected.model
    assert all(isinstance(value, str) for value in found.values()), "KFP would turn numbers into floats"


def test_a_section_changes_only_with_its_own_keys(data, tmp_path):
    before = run(tmp_path, data=str(data))
    after = run(tmp_path, data=str(data), overrides="train.lr=0.001")
    assert {key for key in before if before[key] != after[key]} == {"train_params"}


def test_the_data_version_is_the_one_that_preprocess_will_find(data, tmp_path):
    before = run(tmp_path, data=str(data))["data_version"]
    assert before == resolve(str(data), "auto", tmp_path / "work").version
    data.write_text(ROWS + "one more,topic 1\n")
    assert run(tmp_path, data=str(data))["data_version"] != before


RESOLVED = {
    "a preset": ({"preset": "digits"}, lambda p: p.task.name == "image"),
    "params instead of a preset": ({"preset": "", "params": "train: {epochs: 7}"}, lambda p: p.train.epochs == 7),
    "JSON": ({"params": '{"train": {"epochs": 7}}'}, lambda p: p.train.epochs == 7),
    "data": ({"data": "s3://b/reviews.csv"}, lambda p: (p.data.source, p.promote.model) == ("s3://b/reviews.csv", "reviews")),
    "data of the preset": ({"data": "builtin:stdlib-functions"}, lambda p: p.promote.model == "text-classify"),
    "a name given": ({"data": "x.csv", "overrides": "promote.model=mine"}, lambda p: p.promote.model == "mine"),
    "words": ({"overrides": " train.lr=0.01   train.epochs=3 "}, lambda p: (p.train.lr, p.train.epochs) == (0.01, 3)),
    "lines": ({"overrides": "train.lr=0.01\n\ntrain.epochs=3\n"}, lambda p: p.train.epochs == 3),
    "a list": ({"overrides": ["train.lr=0.01"]}, lambda p: p.train.lr == 0.01),
    "lists with spaces": ({"overrides": "train.betas=[0.5, 0.6] train.epochs=3"}, lambda p: p.train.betas == (0.5, 0.6)),
    "trials": ({"trials": 9.0}, lambda p: p.tune.trials == 9),
    "no trials": ({"trials": 0}, lambda p: p.tune.trials == configure.resolve({}).tune.trials),
    "an override wins": ({"trials": 9, "overrides": "tune.trials=2"}, lambda p: p.tune.trials == 2),
    "processors": ({"gpus_per_node": 0}, lambda p: p.train.processes == 1),
    "accelerators": ({"gpus_per_node": 4.0}, lambda p: p.train.processes == 4),
    "registry": ({"registry": "s3://b/reg"}, lambda p: p.promote.registry == "s3://b/reg"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESOLVED)
def test_the_run_form(case):
    values, holds = RESOLVED[case]
    assert holds(configure.resolve(values))


WRONG = {
    "preset": ({"preset": "text-clasify"}, "did you mean 'text-classify'"),
    "params": ({"preset": "", "params": "[1]"}, "parameter params"),
    "both": ({"preset": "digits", "params": "train: {epochs: 7}"}, "preset and params"),
    "a section that is none": ({"params": "data: 3", "data": "rows.csv"}, "data"),
    "a key": ({"params": "train: {epoch: 3}"}, "train.epoch"),
    "an override": ({"overrides": "train.epoch=3"}, "train.epoch"),
    "no override": ({"overrides": "epochs"}, "section.key=value"),
    "trials": ({"trials": -1}, "parameter trials"),
    "half a trial": ({"trials": 1.5}, "parameter trials"),
    "no number": ({"trials": float("nan")}, "parameter trials"),
    "no end of trials": ({"trials": float("inf")}, "parameter trials"),
    "a truth for a number": ({"trials": True}, "parameter trials"),
    "no node": ({"nodes": 0}, "parameter nodes"),
    "nodes": ({"nodes": 2}, "cluster.job.train=pytorchjob"),
    "a cluster of another schema": ({"cluster_params": '{"jobs": {}}'}, "cluster.job"),
    "a cluster that is none": ({"cluster_params": "[1]"}, "parameter cluster_params"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_run_form_names_the_field(case, tmp_path):
    values, message = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        configure.run(given(tmp_path, **values), [])
    assert message in str(caught.value)
    assert not (tmp_path / "output.json").exists()


PLACES = {
    "data": ({"data": "http://localhost:1/rows.csv?X-Amz-Signature=hunter2canary"}, "data.source"),
    "data of params": ({"params": "data: {source: 'https://me:hunter2canary@localhost:1/rows.csv'}"}, "data.source"),
    "a repository": ({"data": "dvc:https://me:hunter2canary@localhost:1/repo@v1:rows.csv"}, "data.source"),
    "registry": ({"registry": "s3://AKIA:hunter2canary@bucket/reg"}, "promote.registry"),
    "store": ({"store": "s3://AKIA:hunter2canary@bucket/runs"}, "store"),
    "a folder of the container": ({"store": "runs"}, "parameter store"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_with_a_secret_or_of_one_pod_alone_is_refused(case, data, tmp_path):
    values, name = PLACES[case]
    with pytest.raises(ConfigError, match=name) as caught:
        configure.run(given(tmp_path, **{"data": "" if "params" in values else str(data), **values}), [])
    assert "hunter2canary" not in str(caught.value)
    assert not (tmp_path / "output.json").exists()


def test_a_store_without_a_driver_is_said_before_anything_runs(data, tmp_path):
    with pytest.raises(StorageError, match="nosuch"):
        configure.run(given(tmp_path, data=str(data), store="nosuch://bucket/runs", registry=str(tmp_path / "r")), [])


@pytest.mark.parametrize(
    "source",
    ["dvc:git@host.example:team/data@v1:rows.csv", "dvc:ssh://git@host.example:22/team/data@v1:rows.csv",
     "dvc:https://host.example/team/data@v1:rows.csv", "abfs://container@account.dfs.core.windows.net/rows.csv"],
)  # fmt: skip
def test_a_name_before_a_host_is_no_secret(source):
    configure.refuse_secrets({"data.source": source})


def test_what_is_pasted_with_spaces_around_it_is_meant_without(data, tmp_path):
    found = run(tmp_path, data=f" {data}\n", preset=" text-classify ", store=f" {tmp_path}/store/ ", registry=" ")
    assert json.loads(found["data_params"])["source"] == str(data)
    assert json.loads(found["promote_params"])["registry"] == f"{tmp_path}/store/registry"


def test_what_the_run_form_says_of_the_cluster_is_said_to_have_no_effect(data, tmp_path, capsys):
    run(tmp_path, data=str(data), overrides="cluster.retries=7")
    assert "cluster" in capsys.readouterr().out
    assert "cluster" in (tmp_path / "summary").read_text()


def test_the_cluster_that_was_compiled_in_is_no_choice_of_the_form(data, tmp_path):
    compiled = '{"retries": 5, "job": {"train": "trainjob"}}'
    given_values = {"cluster_params": compiled, "store": "memory://runs", "overrides": "cluster.job.train=pod"}
    plan = configure.make({"preset": "text-classify", "data": str(data), **given_values})
    assert (plan.params.cluster.retries, plan.params.cluster.job.train) == (5, "trainjob")
    assert any("cluster" in warning for warning in plan.warnings)
    assert "cluster_params" not in run(tmp_path, data=str(data), **given_values), "what is launched has the constant"


def test_what_the_form_says_of_the_cluster_as_it_was_compiled_is_no_news(data):
    params = "cluster: {retries: 5}"
    plan = configure.make({"params": params, "data": str(data), "cluster_params": '{"retries": 5}'})
    assert not [warning for warning in plan.warnings if "cluster" in warning]


@pytest.mark.parametrize(("form", "nodes"), [({}, "1"), ({"nodes": 4.0}, "4")])
def test_a_job_of_the_cluster_trains_on_several_nodes(form, nodes, data, tmp_path):
    found = run(
        tmp_path, data=str(data), cluster_params=JOB["a PyTorchJob"], store="memory://runs", gpus_per_node=2.0, **form
    )
    assert (found["train_nodes"], found["train_gpus"]) == (nodes, "2")
    assert json.loads(found["train_params"])["processes"] == 2
    assert f"`pytorchjob`, {nodes} x 2 processes" in (tmp_path / "summary").read_text()


JOB = {
    "a PyTorchJob": '{"job": {"train": "pytorchjob"}}',
    "a TrainJob": '{"job": {"train": "trainjob"}}',
    "an Experiment": '{"job": {"tune": "experiment"}}',
    "both, with a claim": '{"job": {"train": "pytorchjob", "tune": "experiment"}, "claim": "shared", "mount": "/data"}',
    "a claim alone": '{"claim": "shared", "mount": "/data"}',
}


@pytest.mark.parametrize(
    ("compiled", "store", "overrides", "accepted"),
    [
        ("a PyTorchJob", "", "", False),
        ("a PyTorchJob", "/data/runs", "", False),
        ("a TrainJob", "", "", False),
        ("an Experiment", "", "", False),
        ("an Experiment", "", "tune.enabled=false", False),
        ("both, with a claim", "", "", False),
        ("both, with a claim", "/data", "", True),
        ("both, with a claim", "/data/runs", "", True),
        ("both, with a claim", "file:///data/runs", "", True),
        ("both, with a claim", "/data/../tmp/runs", "", False),
        ("both, with a claim", "/database/runs", "", False),
        ("a PyTorchJob", "memory://runs", "", True),
        ("a claim alone", "", "", True),
    ],
)
def test_the_pods_of_a_job_need_a_store_that_they_see(compiled, store, overrides, accepted, data):
    values = {"preset": "text-classify", "data": str(data), "cluster_params": JOB[compiled], "store": store,
              "overrides": overrides or "tune.enabled=true"}  # fmt: skip
    if accepted:
        configure.make(values)
        return
    with pytest.raises(ConfigError, match=r"parameter store: .*cluster\.job\.") as caught:
        configure.make(values)
    assert "s3://" in caught.value.hint
    assert "cluster.claim" in caught.value.hint


def test_data_that_is_not_there_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"none\.csv"):
        configure.run(given(tmp_path, data="none.csv"), [])


@pytest.fixture
def champion(tmp_path, data):
    """A registry whose champion of `rows` was trained on the data."""
    version = resolve(str(data), "auto", tmp_path / "work").version
    model, test = tmp_path / "model", tmp_path / "held-out"
    for folder, kind in ((model, "model"), (test, "dataset")):
        folder.mkdir()
        (folder / "file").write_text("content")
        manifest.seal(folder, kind, {"data_version": version}, {})
    registry = Registry(tmp_path / "registry")
    entered = registry.add("rows", model, test, {"accuracy": 0.5}, bytes=7, metrics={"accuracy": 0.5})
    registry.promote("rows", entered.version, "", "better")
    return str(tmp_path / "registry")


@pytest.mark.parametrize(
    ("only", "changed", "proceed"), [(True, False, "false"), (True, True, "true"), (False, False, "true")]
)
def test_nothing_new_stops_a_scheduled_run(only, changed, proceed, champion, data, tmp_path):
    if changed:
        data.write_text(ROWS + "one more,topic 1\n")
    found = run(tmp_path, data=str(data), registry=champion, only_if_new=only)
    assert found["proceed"] == proceed
    assert ("Nothing new" in (tmp_path / "summary").read_text()) == (proceed == "false")


def test_without_a_champion_there_is_something_new(data, tmp_path):
    assert run(tmp_path, data=str(data), registry=str(tmp_path / "registry"), only_if_new=True)["proceed"] == "true"


def test_a_registry_of_the_container_is_not_kept_and_said(data, tmp_path, capsys):
    found = run(tmp_path, data=str(data))
    assert Path(json.loads(found["promote_params"])["registry"]).is_absolute()
    assert "no registry was given" in capsys.readouterr().out
    assert "no registry was given" in (tmp_path / "summary").read_text()


def test_with_a_store_the_registry_is_in_it(data, tmp_path, capsys):
    found = run(tmp_path, data=str(data), store=f"{tmp_path}/store/")
    assert json.loads(found["promote_params"])["registry"] == f"{tmp_path}/store/registry"
    assert "no registry" not in capsys.readouterr().out


def test_a_registry_given_as_a_file_uri_is_used(data, tmp_path, capsys):
    found = run(tmp_path, data=str(data), registry=f"file://{tmp_path}/reg")
    assert json.loads(found["promote_params"])["registry"] == f"file://{tmp_path}/reg"
    assert "no registry" not in capsys.readouterr().out


def test_a_folder_registry_that_is_there_is_used(data, tmp_path):
    (tmp_path / "registry").mkdir()
    assert json.loads(run(tmp_path, data=str(data))["promote_params"])["registry"] == "registry"


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_runs_from_the_form(name):
    assert isinstance(configure.resolve({"preset": name}), Params)


def test_only_train_asks_for_more_than_one_accelerator(data, tmp_path):
    found = run(tmp_path, data=str(data), gpus_per_node=4.0, overrides="tune.enabled=true")
    assert (found["tune_gpus"], found["train_gpus"], found["distill_gpus"]) == ("1", "4", "1")


def test_a_trial_of_an_experiment_has_the_accelerators_of_training(data, tmp_path):
    values = {"cluster_params": JOB["an Experiment"], "store": "memory://runs", "gpus_per_node": 4.0}
    found = run(tmp_path, data=str(data), overrides="tune.enabled=true", **values)
    assert (found["tune_gpus"], found["train_gpus"], found["distill_gpus"]) == ("4", "4", "1")
    found = run(tmp_path, data=str(data), overrides="tune.enabled=false", **values)
    assert found["tune_gpus"] == "0"


def test_a_stage_that_is_switched_off_asks_for_no_accelerator(data, tmp_path):
    found = run(tmp_path, data=str(data), gpus_per_node=2.0, overrides="tune.enabled=false")
    assert (found["tune_gpus"], found["train_gpus"], found["distill_gpus"]) == ("0", "2", "1")


def test_a_secret_in_the_sources_uri_is_in_no_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = "https://user:hunter2canary@localhost:1/rows.csv"
    with pytest.raises(Exception) as caught:  # noqa: PT011 - nothing listens there
        configure.run(given(tmp_path, data=source), [])
    assert "hunter2canary" not in str(caught.value) + capsys.readouterr().out
