"""The coordinator of a run without Kubeflow Pipelines: what it starts, what it leaves out, and what its terminal is told."""

import json
import sys

import pytest

from components.launch import chain, chain_facts, chain_job, chain_log, chain_plan, chain_start, security
from components.launch.api import ApiError
from components.launch.chain import Chain
from components.launch.launcher import JobFailed, Stopped
from pipelines import dvcfile
from trainer.artifacts import manifest
from trainer.config.load import validate
from trainer.errors import ConfigError, MillraceError
from trainer.stage import STAGES

ORDER = list(STAGES)


def params_at(tmp_path, **sections):
    cluster = {"claim": "shared", "mount": str(tmp_path / "mnt"), **sections.pop("cluster", {})}
    sections = {"data": {"source": "builtin:stdlib-functions"}, **sections}
    return chain_plan.settled(validate({"cluster": cluster, **sections}))


class Cluster:
    """Runs a step by writing what it would make; a stage in `broken` raises its error instead, once."""

    def __init__(self, decision="promoted", broken=None, says=(), idle=()):
        self.started, self.decision, self.broken, self.says, self.idle = [], decision, broken or {}, says, idle

    def __call__(self, step, hear):
        self.started.append(step.stage)
        for line in self.says:
            hear(line)
        if step.stage in self.broken:
            raise self.broken.pop(step.stage)
        for port, uri in step.outputs.items():
            if port == chain_plan.CONFIGURE or step.stage in self.idle:
                continue
            from pathlib import Path

            folder = Path(uri)
            folder.mkdir(parents=True)
            contents = {
                "best.json": {"params": {}},
                "metrics.json": {"candidate": {}},
                "promotion.json": {"decision": self.decision},
            }
            for name in chain_facts.FILES.get(port, ()):
                (folder / name).write_text(json.dumps(contents[name]), encoding="utf-8")
            manifest.seal(
                folder, STAGES[step.stage].outputs[port].kind, {"made": "by a test"}, {"metrics": {"accuracy": 0.5}}
            )


def told(capsys):
    """The events that were printed: kind, stage and code."""
    events = [chain_log.read(line) for line in capsys.readouterr().out.splitlines()]
    return [(each.kind, each.stage, each.code) for each in events if each.kind != "line"]


def test_stages_are_wired_as_on_a_laptop(tmp_path):
    params = params_at(tmp_path)
    local = dvcfile.build(validate({"data": {"source": "builtin:stdlib-functions"}}))["stages"]
    steps = chain_plan.steps(params, "s3://bucket/run")
    assert [step.stage for step in steps] == [name for name in local if name != "raw"]
    for step in steps:
        ports = [word.replace("s3://bucket/run/", "out/") for word in step.args if "=s3://" in word]
        assert ports == [word for word in local[step.stage]["cmd"].split() if "=out/" in word]
        assert ("--allow-refusal" in step.args) == ("--allow-refusal" in local[step.stage]["cmd"])


def test_all_stages_run_in_order_and_the_decision_is_told(tmp_path, capsys):
    cluster = Cluster()
    assert chain.run(Chain(params_at(tmp_path), "r1", cluster)) == 0
    assert cluster.started == ["configure", *ORDER]
    events = told(capsys)
    assert [event[:2] for event in events[:-1]] == [
        (kind, stage) for stage in ["configure", *ORDER] for kind in ("running", "done")
    ]
    assert events[-1] == ("end", "", 0)


def test_a_refused_candidate_is_no_failure_of_the_job_and_status_4_at_the_terminal(tmp_path, capsys):
    assert chain.run(Chain(params_at(tmp_path), "r1", Cluster("refused"))) == 0
    assert told(capsys)[-1] == ("end", "", 4)


def test_what_is_complete_is_not_made_again(tmp_path, capsys):
    params = params_at(tmp_path)
    first = Cluster(
        broken={"distill": JobFailed("distill: pod-0 ended with exit code 3: diverged", "lower train.lr", 3)}
    )
    assert chain.run(Chain(params, "r1", first)) == 3
    assert first.started == ["configure", "preprocess", "tune", "train", "distill"]
    events = told(capsys)
    assert events[-2:] == [("failed", "distill", 3), ("end", "distill", 3)]
    second = Cluster()
    assert chain.run(Chain(params, "r1", second)) == 0
    assert second.started == ["distill", "quantize", "evaluate", "promote"]
    assert told(capsys)[:3] == [("kept", stage, 0) for stage in ("preprocess", "tune", "train")]
    third = Cluster()
    assert chain.run(Chain(params, "r1", third)) == 0
    assert third.started == []
    assert told(capsys)[-1] == ("end", "", 0)


def test_a_stage_without_a_result_is_made_again_and_all_after_it(tmp_path):
    params = params_at(tmp_path)
    chain.run(Chain(params, "r1", Cluster(broken={"promote": JobFailed("", "", 1)})))
    (tmp_path / "mnt/runs/r1/model/manifest.json").unlink()
    again = Cluster(broken={"distill": JobFailed("", "", 1)}, idle=("train",))
    chain.run(Chain(params, "r1", again))
    assert again.started[0] == "train"
    assert "preprocess" not in again.started


def test_success_without_a_result_is_a_failure(tmp_path, capsys):
    assert chain.run(Chain(params_at(tmp_path), "r1", Cluster(idle=("tune",)))) == 2
    assert told(capsys)[-2:] == [("failed", "tune", 2), ("end", "tune", 2)]


def test_runs_do_not_share_results(tmp_path):
    params, second = params_at(tmp_path), Cluster()
    chain.run(Chain(params, "r1", Cluster()))
    chain.run(Chain(params, "r2", second))
    assert second.started == ["configure", *ORDER]


@pytest.mark.parametrize(("code", "status"), [(2, 2), (3, 3), (137, 1), (143, 1)])
def test_only_the_coordinators_own_end_is_worth_another_try(tmp_path, capsys, code, status):
    cluster = Cluster(broken={"train": JobFailed("train: killed", "", code)})
    assert chain.run(Chain(params_at(tmp_path), "r1", cluster)) == status
    assert told(capsys)[-2] == ("failed", "train", code)


@pytest.mark.parametrize(
    "error",
    [ApiError(0, "Gone", "no answer"), ApiError(503, "Busy", "starting"), Stopped(15, "SIGTERM")],
    ids=["no answer", "busy", "signal"],
)
def test_a_coordinator_that_is_interrupted_says_nothing_of_a_failure(tmp_path, capsys, error):
    params = params_at(tmp_path)
    assert chain.run(Chain(params, "r1", Cluster(broken={"train": error}))) == 143
    assert told(capsys)[-1] == ("running", "train", 0)
    after = Cluster()
    assert chain.run(Chain(params, "r1", after)) == 0
    assert after.started[0] == "train"


@pytest.mark.parametrize("status", [400, 403, 404, 422])
def test_what_the_cluster_refuses_fails_the_stage_for_good(tmp_path, capsys, status):
    cluster = Cluster(broken={"train": ApiError(status, "Refused", "pytorchjobs is forbidden")})
    assert chain.run(Chain(params_at(tmp_path), "r1", cluster)) == 2
    assert told(capsys)[-2:] == [("failed", "train", 2), ("end", "train", 2)]


def test_until_stops_after_the_stage_and_another_attempt_goes_on(tmp_path, capsys):
    params, first, second = params_at(tmp_path), Cluster(), Cluster()
    assert chain.run(Chain(params, "r1", first, until="train")) == 0
    assert first.started == ["configure", "preprocess", "tune", "train"]
    assert told(capsys)[-1] == ("end", "", 0)
    assert chain.run(Chain(params, "r1", Cluster(), until="tune")) == 0
    assert chain.run(Chain(params, "r1", second)) == 0
    assert second.started[0] == "distill"


def test_nothing_new_ends_early(tmp_path, capsys):
    cluster = Cluster(says=["configure: nothing new: champion v0001 was trained on this version of the data"])
    assert chain.run(Chain(params_at(tmp_path), "r1", cluster, only_if_new=True)) == 0
    assert cluster.started == ["configure"]
    assert told(capsys)[-1] == ("end", "", 0)


def test_configure_understands_what_the_coordinator_asks_it(tmp_path, capsys):
    from trainer import configure

    params = params_at(tmp_path, data={"source": str(tmp_path / "mnt/rows.csv")}, promote={"registry": "registry"})
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt/rows.csv").write_text("text,label\na,x\n", encoding="utf-8")
    step = chain.configure(params, chain_plan.root(params, "r1"), only_if_new=True)
    assert step.args[:2] == ("configure", "--executor-input")
    text = step.args[2].replace("executor_output.json", str(tmp_path / "out.json"))
    assert configure.run(text, []) == 0
    values = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["parameterValues"]
    assert values["proceed"] == "true"
    assert "Note" not in capsys.readouterr().out


UNREACHABLE = {
    "nowhere to put artifacts": ({"claim": ""}, {}, "cluster.store, cluster.claim"),
    "a store on one pod": ({"claim": "", "store": "/data/runs"}, {}, "cluster.store"),
    "a store beside the claim": ({"store": "/elsewhere"}, {}, "cluster.store"),
    "a file of this machine": ({}, {"data": {"source": "rows.csv"}}, "data.source"),
    "a path with .. in it": ({}, {"data": {"source": "/mnt/millrace/../rows.csv"}}, "data.source"),
    "a tokenizer of this machine": ({}, {"data": {"tokenizer": {"path": "tok.json"}}}, "data.tokenizer.path"),
    "a teacher of this machine": ({}, {"distill": {"teachers": ["out/model"]}}, "distill.teachers"),
    "a registry of one pod": ({}, {"promote": {"registry": "/registry"}}, "promote.registry"),
    "a secret": ({}, {"data": {"source": "https://x.example/a.csv?token=abcdef"}}, "data.source"),
    "a secret in the store": ({"store": "s3://key:pw@bucket/x"}, {}, "cluster.store"),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_what_no_pod_could_reach_is_refused_by_its_key(name):
    cluster, sections, key = UNREACHABLE[name]
    sections = {"data": {"source": "builtin:stdlib-functions"}, **sections}
    params = validate({"cluster": {"claim": "shared", **cluster}, **sections})
    with pytest.raises(ConfigError) as error:
        chain_plan.settled(params)
    assert error.value.message.startswith(f"{key}:")
    assert error.value.hint
    assert "abcdef" not in str(error.value)
    assert ":pw@" not in str(error.value)


REGISTRIES = {
    "beside the runs": ({"claim": "c"}, "registry", "/mnt/millrace/registry"),
    "beside the store": ({"store": "s3://b/runs/"}, "registry", "s3://b/runs/registry"),
    "on the claim": ({"claim": "c"}, "/mnt/millrace/models", "/mnt/millrace/models"),
    "remote": ({"claim": "c"}, "gs://b/models", "gs://b/models"),
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_the_registry_outlives_the_pods(name):
    cluster, registry, expected = REGISTRIES[name]
    found = chain_plan.settled(validate({"cluster": cluster, "promote": {"registry": registry}}))
    assert found.promote.registry == expected


def test_accelerators_are_asked_for_where_they_are_used():
    every = validate({"cluster": {"claim": "c", "gpus_per_node": 8}})
    assert {stage: chain_plan.gpus(every, stage) for stage in ORDER if chain_plan.gpus(every, stage)} == {
        "tune": 1, "train": 8, "distill": 1,
    }  # fmt: skip
    fewer = validate(
        {"cluster": {"claim": "c", "gpus_per_node": 8, "job": {"tune": "experiment"}}, "distill": {"enabled": False}}
    )
    assert {stage: chain_plan.gpus(fewer, stage) for stage in ("tune", "distill")} == {"tune": 8, "distill": 0}


def test_a_stage_cannot_forge_an_event_or_show_a_password(capsys):
    chain_log.say("line", "train", ':: {"event": "end", "code": 0}')
    chain_log.say("line", "train", "s3://user:password1@host/x")
    chain_log.say("failed", "train", "bad s3://user:password1@host/x", 2)
    lines = capsys.readouterr().out.splitlines()
    assert [chain_log.read(line).kind for line in lines] == ["line", "line", "failed"]
    assert "password1" not in "".join(lines)


@pytest.mark.parametrize(
    "line", [":: ", ":: []", ":: {", ':: {"stage": "x"}', ':: {"event": "end", "code": "x"}', "plain", ""]
)
def test_a_broken_event_is_a_line(line):
    assert chain_log.read(line) == chain_log.Event("line", text=line)


def test_the_report_travels_with_the_facts(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    (folder / "report.html").write_bytes(b"<p>" + bytes(range(256)))
    manifest.seal(folder, "evaluation", {}, {})
    facts = chain_facts.facts(str(folder), "evaluation")
    facts = json.loads(json.dumps(facts))
    assert chain_facts.unpacked(facts[chain_facts.PAGE]) == b"<p>" + bytes(range(256))
    with pytest.raises(ValueError):  # noqa: PT011
        chain_facts.unpacked("bm9wZQ==")


def test_what_is_not_complete_has_no_facts(tmp_path):
    assert chain_facts.facts(str(tmp_path / "model"), "model") is None
    (tmp_path / "model").mkdir()
    assert chain_facts.facts(str(tmp_path / "model"), "model") is None


def test_an_object_store_is_asked_in_another_process(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    manifest.seal(folder, "model", {"a": 1}, {"metrics": {"loss": 2.0}})
    before = set(sys.modules)
    facts = chain_facts.facts(f"local://{folder}", "model")
    assert facts["model/manifest.json"]["record"] == {"metrics": {"loss": 2.0}}
    assert "fsspec" not in set(sys.modules) - before


def job_of(run="20261121-100000-ab12", until=""):
    params = chain_plan.settled(validate({"cluster": {"claim": "shared"}}))
    return chain_job.coordinator(params, run, "team", until)


def test_the_coordinator_passes_the_policy_restricted_and_has_a_token():
    job = job_of()
    pod = job["spec"]["template"]["spec"]
    assert security.restricted(pod) == []
    assert pod["automountServiceAccountToken"] is True
    assert pod["serviceAccountName"] == "millrace-launcher"
    assert job["spec"]["backoffLimit"] > 0
    env = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert env["MILLRACE_RUN"] == "20261121-100000-ab12"
    assert validate(json.loads(env["MILLRACE_PARAMS"].replace("$$", "$"))).cluster.claim == "shared"


def test_the_coordinator_reads_the_store_with_the_variables_and_secrets_of_the_stages():
    cluster = {
        "store": "s3://b/runs",
        "job": {"env": {"AWS_ENDPOINT_URL": "http://minio:9000"}},
        "secrets": {"AWS_ACCESS_KEY_ID": "s/k"},
    }
    job = chain_job.coordinator(chain_plan.settled(validate({"cluster": cluster})), "r1")
    env = {each["name"]: each for each in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["AWS_ENDPOINT_URL"]["value"] == "http://minio:9000"
    assert env["AWS_ACCESS_KEY_ID"]["valueFrom"] == {"secretKeyRef": {"name": "s", "key": "k"}}


def test_a_second_coordinator_is_of_the_same_run_with_the_same_parameters():
    made = job_of(until="train")
    # What the API server adds.
    made["metadata"] |= {"uid": "u1", "resourceVersion": "5", "creationTimestamp": "2026-11-21T10:00:00Z"}
    made["spec"] |= {"selector": {"matchLabels": {"batch.kubernetes.io/controller-uid": "u1"}}, "suspend": False}
    made["spec"]["template"]["metadata"]["labels"] |= {
        "controller-uid": "u1",
        "batch.kubernetes.io/controller-uid": "u1",
    }
    again = chain_job.again(made, "millrace-20261121-100000-ab12-2")
    assert chain_job.run_of(again) == "20261121-100000-ab12"
    assert "selector" not in again["spec"]
    assert "u1" not in json.dumps(again)
    assert set(again["metadata"]) == {"name", "namespace", "labels"}
    before, after = (
        {each["name"]: each for each in job["spec"]["template"]["spec"]["containers"][0]["env"]}
        for job in (made, again)
    )
    assert after.pop("MILLRACE_UNTIL") == {"name": "MILLRACE_UNTIL", "value": ""}
    before.pop("MILLRACE_UNTIL")
    assert after == before


def test_a_schedules_run_is_that_of_its_job_for_every_attempt():
    job = job_of()
    job["metadata"] = {
        "name": "retrain-29400000",
        "namespace": "team",
        "labels": {"app.kubernetes.io/component": "chain"},
    }
    env = job["spec"]["template"]["spec"]["containers"][0]["env"]
    job["spec"]["template"]["spec"]["containers"][0]["env"] = [each for each in env if each["name"] != "MILLRACE_RUN"]
    again = chain_job.again(job, "millrace-retrain-29400000-2", "evaluate")
    assert chain_job.run_of(again) == "retrain-29400000"
    found = {each["name"]: each.get("value") for each in again["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (found["MILLRACE_RUN"], found["MILLRACE_UNTIL"]) == ("retrain-29400000", "evaluate")


def test_the_owner_is_known_only_inside_the_coordinators_pod():
    assert chain_job.owner({}) is None
    found = chain_job.owner({"MILLRACE_OWNER": "millrace-r1", "MILLRACE_OWNER_UID": "u1"})
    assert found == {"apiVersion": "batch/v1", "kind": "Job", "name": "millrace-r1", "uid": "u1"}


@pytest.mark.parametrize("run", ["", "Upper", "a_b", "../x", "a" * 80])
def test_a_run_without_a_usable_name_is_refused(monkeypatch, capsys, run):
    from components.launch.__main__ import parse_args

    for name in ("MILLRACE_RUN", "MILLRACE_OWNER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MILLRACE_PARAMS", json.dumps({"cluster": {"claim": "shared"}}))
    args = parse_args(["chain", "--params", "env:MILLRACE_PARAMS", "--run", run])
    assert chain.main(args) == 2
    events = [chain_log.read(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event.kind, event.code) for event in events] == [("failed", 2), ("end", 2)]
    assert events[0].text.startswith("--run ")


def test_a_store_that_cannot_be_read_fails_the_stage_that_needs_it(tmp_path, capsys):
    (tmp_path / "mnt/runs/r1/dataset").mkdir(parents=True)
    (tmp_path / "mnt/runs/r1/dataset/manifest.json").mkdir()
    assert chain.run(Chain(params_at(tmp_path), "r1", Cluster())) == 2
    assert told(capsys) == [("failed", "preprocess", 2), ("end", "preprocess", 2)]


# The terminal


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--attach", "r1", "--resume"], "--attach and --resume"),
        (["--resume", "train.lr=1"], "--resume with train.lr=1"),
        (["--cancel", "r1", "train.lr=1"], "--cancel with train.lr=1"),
        (["--runs", "train.lr=1"], "--runs with train.lr=1"),
    ],
)
def test_what_cannot_be_asked_for_together_is_refused_before_the_cluster_is_asked(
    tmp_path, monkeypatch, capsys, words, key
):
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert cli.main(["run", "--engine", "kubernetes", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {key}")


@pytest.mark.parametrize("word", ["--attach", "--resume", "--cancel", "--detach", "--runs", "--namespace=x"])
def test_words_of_this_engine_are_refused_by_the_others(tmp_path, monkeypatch, capsys, word):
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", word]) == 2
    assert "--engine kubernetes" in capsys.readouterr().err


def test_a_wrong_parameter_is_told_before_the_cluster_is_asked_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert cli.main(["preset", "use", "text-classify"]) == 0
    before = (tmp_path / "params.yaml").read_bytes()
    for words, key in (
        (["train.lr=-1", "cluster.claim=c"], "train.lr"),
        (["train.lr=1e-3"], "cluster.store, cluster.claim"),
    ):
        assert cli.main(["run", "--engine", "kubernetes", *words]) == 2
        assert key in capsys.readouterr().err
    assert (tmp_path / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "model/../../evil"])
def test_a_coordinator_writes_nowhere_but_in_the_folder_of_its_run(tmp_path, name):
    from pipelines import kubernetes_engine

    with pytest.raises(MillraceError):
        kubernetes_engine.keep(tmp_path / "run", {name: {}})
    assert list(tmp_path.iterdir()) == []


def test_what_the_coordinator_tells_is_what_the_last_screen_is_drawn_from(tmp_path):
    from pipelines import kubernetes_engine, screen

    params = params_at(tmp_path)
    chain.run(Chain(params, "r1", Cluster()))
    for step in chain_plan.steps(params, chain_plan.root(params, "r1")):
        for port, uri in step.outputs.items():
            kubernetes_engine.keep(tmp_path / "here", json.loads(json.dumps(chain_facts.facts(uri, port))))
    assert screen.stage_summary("train", tmp_path / "here") == "accuracy 0.5"
    lines = screen.last_screen(tmp_path, screen.Paint(sys.stdout), 3.0, 8, out="here", there="s3://b/r1")
    assert "  Done in 3.0 s." in lines
    assert any("s3://b/r1/quantized" in line for line in lines)
    assert any("here/evaluation/report.html" in line for line in lines)


def test_what_outlives_a_pod_is_on_the_claim_even_where_artifacts_are_not(tmp_path):
    params = params_at(tmp_path, cluster={"store": "s3://b/runs"}, promote={"registry": "s3://b/registry"})
    root = chain_plan.root(params, "r")
    for step in chain_plan.steps(params, root):
        job = chain_start.single(params, "r", step)
        assert job.args == (*step.args, "--scratch", f"{params.cluster.mount}/scratch/{job.name}")
    first = chain.configure(params, root, only_if_new=False)
    assert chain_start.single(params, "r", first).args == first.args
    on_claim = params_at(tmp_path)
    for step in chain_plan.steps(on_claim, chain_plan.root(on_claim, "r")):
        assert chain_start.single(on_claim, "r", step).args == step.args
