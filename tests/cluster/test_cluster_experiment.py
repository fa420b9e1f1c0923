"""A search as an Experiment of the real Katib, with trials that print what they are told to."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from components.launch import experiments
from components.launch.api import Api
from components.launch.asked import Asked
from components.launch.trials import value_of
from tests.cluster_jobs import IMAGE, Lines, pods
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.record import Clock

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

# Katib joins the words of a trial and gives them to a shell: what follows is the text of its first word.
# It takes its time, because Katib's collector must find the process that it watches.
READS = (
    'python -u -c "import sys, time; time.sleep(3); '
    "lr = [float(w[9:]) for w in sys.argv if w.startswith('train.lr=')][0]; {}\""
)
SCORES = READS.format("print(f'val_accuracy={lr:.6f}')")
FAILS = READS.format("sys.exit('error: train.lr: too high\\n  fix: lower tune.space.train.lr.high')")
SILENT = READS.format("print('nothing to see')")


def asked(**changes: Any) -> Asked:
    values = {
        "tune.sampler": "random", "tune.trials": 4, "tune.pruner": "none", "tune.metric": "val_accuracy",
        "tune.space": {"train.lr": {"type": "float", "low": 0.1, "high": 0.9}}, "cluster.job.parallel_trials": 2,
        "cluster.job.tune": "experiment", "cluster.job.failed_trials": 1, "cluster.claim": "millrace",
        "cluster.job.queue_timeout_s": 120,
    }  # fmt: skip
    words = [f"{key}={json.dumps(value)}" for key, value in (values | changes).items()]
    params = load(None, words)
    inputs, outputs = {"dataset": "/mnt/millrace/dataset"}, {"tuning": f"/mnt/millrace/{secrets.token_hex(4)}/tuning"}
    return Asked("tune", params, inputs, outputs)


def searched(api: Api, ask: Asked, script: str) -> tuple[Any, Any, Lines, str]:
    job, objects = experiments.rendered(ask, api.namespace, {"dataset": "1234"})
    container = objects[-1]["spec"]["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"][0]
    container |= {"image": IMAGE, "command": ["sh", "-c", script], "resources": {}}
    lines = Lines()
    outcome, found = experiments.search(api, job, ask.params, objects, out=lines)
    return outcome, found, lines, job.name


def test_four_trials_two_at_a_time_and_the_best_is_that_of_their_own_metrics(api: Api, tmp_path: Path) -> None:
    ask = asked()
    outcome, found, lines, name = searched(api, ask, SCORES)
    assert outcome.ok, lines.text
    assert [trial.state for trial in found.trials] == ["complete"] * 4
    assert found.best.value == max(trial.value for trial in found.trials)
    assert found.best.params == {"train.lr": pytest.approx(found.best.value, abs=1e-5)}
    optimal = api.get("Experiment", name)["status"]["currentOptimalTrial"]
    assert value_of(optimal["observation"], ask.params.tune) == found.best.value
    assert sum(line.startswith("trial ") for line in lines) == 4


def test_all_failing_is_red_with_the_reason_of_a_trial(api: Api) -> None:
    outcome, found, lines, name = searched(api, asked(), FAILS)
    assert found is None
    assert (outcome.ok, outcome.exit_code) == (False, 1)
    assert "train.lr: too high" in outcome.message, lines.text
    assert "lower tune.space.train.lr.high" in outcome.hint
    assert not [pod for pod in pods(api, name) if pod["status"]["phase"] in ("Running", "Pending")]


def test_trials_without_the_metric_are_named_so(api: Api) -> None:
    outcome, found, lines, _ = searched(api, asked(), SILENT)
    assert found is None
    assert outcome.reason == "MetricsUnavailable", lines.text
    assert "val_accuracy=VALUE" in outcome.message


def test_a_goal_ends_the_search_early(api: Api) -> None:
    ask = asked(**{"cluster.job.goal": 0.0, "tune.trials": 8, "cluster.job.parallel_trials": 1})
    outcome, found, lines, _ = searched(api, ask, SCORES)
    assert outcome.ok, lines.text
    assert 1 <= len(found.trials) < 8


def test_the_artifact_is_the_one_that_the_stage_writes(api: Api, tmp_path: Path) -> None:
    ask = asked()
    _, found, _, _ = searched(api, ask, SCORES)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    manifest.seal(dataset, "dataset", {"data_version": "7"}, {}, ())
    here = Asked("tune", ask.params, {"dataset": str(dataset)}, {"tuning": str(tmp_path / "tuning")})
    experiments.publish(here, found, Clock())
    made = manifest.read(tmp_path / "tuning", "tuning")
    assert made.meta["params"] == found.best.params
    assert made.record["data_version"] == "7"
    best = json.loads((tmp_path / "tuning" / "best.json").read_text())
    assert (best["value"], best["params"]) == (found.best.value, found.best.params)
    rows = (tmp_path / "tuning" / "trials.jsonl").read_text().splitlines()
    assert len(rows) == 4
    assert "<svg" in (tmp_path / "tuning" / "search.html").read_text()
