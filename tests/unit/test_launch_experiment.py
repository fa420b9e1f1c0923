"""A search as a Katib Experiment: the same space as Optuna's, what Katib would get wrong is refused, all words are plain."""

import json
import re
from typing import Any

import pytest

from components.launch.experiment import ALGORITHMS, assigned, experiment, no_early_stopping
from components.launch.security import pod_specs
from components.launch.validate import check
from trainer.config.load import load, parse_override
from trainer.config.stages import Dimension, Tune
from trainer.errors import ConfigError
from trainer.tune import space

SPACE = (
    "tune.space={train.lr: {type: float, low: 0.0001, high: 0.1, log: true}, train.batch_size: {type: int, low: 8, high: 64}, "
    "train.label_smoothing: {type: float, low: 0.1, high: 0.8, step: 0.3}, "
    "train.schedule: {type: categorical, choices: [linear, cosine]}, train.compile: {type: categorical, choices: [true, false]}}"
)
KINDS = {"pod": "main", "pytorchjob": "pytorch", "trainjob": "node"}


def made(*words: str, name: str = "search", restricted: bool = True) -> dict[str, Any]:
    params = load(None, ["tune.pruner=none", *words])
    args = ["trial", "--params", "env:MILLRACE_PARAMS", "--in", "dataset=s3://b/d"]
    objects = experiment(params, name=name, args=args, restricted=restricted)
    check(objects)
    return objects[-1]


def refusal(*words: str, name: str = "search") -> str:
    with pytest.raises(ConfigError) as caught:
        made(*words, name=name)
    assert caught.value.hint
    return caught.value.message


def substituted(obj: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
    """A trial's job as Katib makes it: values into the text of the template."""
    template = obj["spec"]["trialTemplate"]
    text = json.dumps(template["trialSpec"])
    for row in template["trialParameters"]:
        text = text.replace(f"${{trialParameters.{row['name']}}}", values[row["reference"]])
    return dict(json.loads(text))


def words_of(obj: dict[str, Any]) -> list[str]:
    """What runs in a trial, the words of its TrainJob included."""
    found = [pod["containers"][0] for pod in pod_specs(obj)] or [obj["spec"]["trainer"]]
    return [*found[0]["command"], *found[0]["args"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_is_what_trains(kind: str) -> None:
    obj = made(SPACE, f"cluster.job.train={kind}", "cluster.job.nodes=2", "cluster.job.ttl_s=0", "tune.sampler=random")
    template = obj["spec"]["trialTemplate"]
    assert template["primaryContainerName"] == KINDS[kind]
    assert '"Succeeded"' in template["successCondition"] or kind != "pytorchjob"
    assert '"Complete"' in template["successCondition"] or kind == "pytorchjob"
    trial = template["trialSpec"]
    assert "name" not in trial["metadata"]
    # Katib must see how a trial's job ended: it may not vanish by itself.
    assert "ttlSecondsAfterFinished" not in json.dumps(trial)
    values = {key: str(index) for index, key in enumerate(obj_keys(obj))}
    words = words_of(substituted(obj, values))
    assert words[-5:] == [f"{key}={value}" for key, value in values.items()]


def obj_keys(obj: dict[str, Any]) -> list[str]:
    return [row["name"] for row in obj["spec"]["parameters"]]


def test_a_trainjobs_runtime_comes_first() -> None:
    params = load(None, ["tune.pruner=none", "cluster.job.train=trainjob"])
    runtime, obj = experiment(params, name="search", args=["trial"])
    assert runtime["kind"] == "TrainingRuntime"
    trial = obj["spec"]["trialTemplate"]["trialSpec"]
    assert trial["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "search"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_space_is_optunas(sampler: str) -> None:
    """Every dimension has the values that the local search draws from, and no others."""
    obj = made(SPACE, f"tune.sampler={sampler}")
    rows = {row["name"]: row for row in obj["spec"]["parameters"]}
    local = space.distributions(load(None, [SPACE]).tune)
    assert list(rows) == list(local)
    lr = rows["train.lr"]["feasibleSpace"]
    assert (float(lr["min"]), float(lr["max"]), lr["distribution"]) == (0.0001, 0.1, "logUniform")
    assert rows["train.batch_size"]["feasibleSpace"] == {"min": "8", "max": "64", "distribution": "uniform"}
    # Katib's services count steps from 0: 0.0, 0.3, 0.6, 0.9 for 0.1 to 0.8 by 0.3.
    assert rows["train.label_smoothing"]["feasibleSpace"] == {"list": ["0.1", "0.4", "0.7"]}
    assert rows["train.compile"]["feasibleSpace"] == {"list": ["true", "false"]}


def test_each_value_reaches_a_trial_with_its_type() -> None:
    tune = load(None, [SPACE]).tune
    given = {"train.lr": "1.5e-05", "train.batch_size": "32.0", "train.label_smoothing": "0.4", "train.schedule": "cosine",
             "train.compile": "false"}  # fmt: skip
    found = assigned(tune, [{"name": key, "value": text} for key, text in given.items()])
    assert found == {"train.lr": 1.5e-05, "train.batch_size": 32, "train.label_smoothing": 0.4, "train.schedule": "cosine",
                     "train.compile": False}  # fmt: skip
    assert type(found["train.batch_size"]) is int
    for key, text in given.items():
        if key != "train.batch_size":
            assert parse_override(f"{key}={text}") == (key, found[key])


def test_an_assignment_of_another_space_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.space\.train\.nope"):
        assigned(Tune(), [{"name": "train.nope", "value": "1"}])


def test_a_grid_has_no_more_trials_than_points() -> None:
    axes = "tune.space={train.batch_size: {type: int, low: 8, high: 12, step: 2}, train.epochs: {type: int, low: 1, high: 2}}"
    obj = made(
        axes, "tune.sampler=grid", "tune.trials=50", "cluster.job.parallel_trials=10", "cluster.job.failed_trials=20"
    )
    spec = obj["spec"]
    assert (spec["maxTrialCount"], spec["parallelTrialCount"], spec["maxFailedTrialCount"]) == (6, 6, 6)
    assert {row["parameterType"] for row in spec["parameters"]} == {"discrete"}
    assert "train.lr: a grid needs a step" in refusal(SPACE, "tune.sampler=grid")


def test_objective_goal_retain_and_counts() -> None:
    obj = made("cluster.job.goal=0.9", "cluster.job.retain=true", "tune.trials=8", "cluster.job.parallel_trials=3")
    spec = obj["spec"]
    assert spec["objective"] == {
        "type": "maximize", "objectiveMetricName": "val_accuracy", "goal": 0.9,
        "metricStrategies": [{"name": "val_accuracy", "value": "max"}],
    }  # fmt: skip
    assert spec["trialTemplate"]["retain"] is True
    assert (spec["maxTrialCount"], spec["parallelTrialCount"], spec["maxFailedTrialCount"]) == (8, 3, 3)
    lower = made("tune.metric=val_loss", "tune.direction=minimize")["spec"]["objective"]
    assert (lower["type"], lower["metricStrategies"][0]["value"]) == ("minimize", "min")
    assert "goal" not in lower


def test_every_sampler_has_an_algorithm_with_its_seed() -> None:
    for sampler, algorithm in ALGORITHMS.items():
        words = ["tune.space={train.epochs: {type: int, low: 1, high: 9}}", f"tune.sampler={sampler}", "tune.seed=7"]
        found = made(*words)["spec"]["algorithm"]
        assert found["algorithmName"] == algorithm
        assert {"name": "random_state", "value": "7"} in found["algorithmSettings"]


def test_median_stop() -> None:
    obj = made("tune.pruner=median", "tune.trials=9", restricted=False)
    settings = {row["name"]: row["value"] for row in obj["spec"]["earlyStopping"]["algorithmSettings"]}
    assert settings == {"min_trials_required": "3", "start_step": "2"}
    assert "earlyStopping" not in made(restricted=False)["spec"]


def test_median_stop_is_left_out_where_its_pod_would_be_refused() -> None:
    assert "earlyStopping" not in made("tune.pruner=median")["spec"]
    assert no_early_stopping(Tune(pruner="median"), restricted=True).startswith("tune.pruner: median is left out")
    assert not no_early_stopping(Tune(pruner="median"), restricted=False)
    assert "tune.pruner" in refusal("tune.pruner=hyperband")


# What is asked for -> how the refusal begins: with its key.
REFUSED = {
    "hyperband": (["tune.pruner=hyperband"], "tune.pruner: "),
    "gp draws floats on a logarithmic scale": (
        ["tune.sampler=gp", "tune.space={train.lr: {type: float, low: 0.1, high: 0.2}}"], "tune.space.train.lr.log: ",
    ),
    "gp draws whole numbers evenly": (
        ["tune.sampler=gp", "tune.space={train.epochs: {type: int, low: 1, high: 9, log: true}}"],
        "tune.space.train.epochs.log: ",
    ),
    "too many steps": (
        ["tune.space={train.lr: {type: float, low: 0.00001, high: 0.1, step: 0.00001}}"], "tune.space.train.lr.step: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_katib_would_get_wrong_is_refused_with_its_key(name: str) -> None:
    words, said = REFUSED[name]
    assert refusal(*words).startswith(said)


@pytest.mark.parametrize(
    ("choice", "said"),
    {"1": "as int 1", "true": "as bool True", "1e-3": "as float 0.001", "a b": "through a shell", "$HOME": "through a shell",
     "": "through a shell", "it's": "through a shell"}.items(),
)  # fmt: skip
def test_texts_that_a_trial_would_read_as_something_else_are_refused(choice: str, said: str) -> None:
    params = load(None, ["tune.pruner=none"])
    space_ = {"train.schedule": Dimension(type="categorical", choices=(choice,))}
    params = params.model_copy(update={"tune": params.tune.model_copy(update={"space": space_})})
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        experiment(params, name="search", args=["trial"])
    assert caught.value.message.startswith("tune.space.train.schedule.choices: ")


@pytest.mark.parametrize("word", ["dataset=s3://b/a b", "dataset=$X", "a;b", "'x'", "a&b", "x(1)", "*", "~"])
def test_words_that_a_shell_would_change_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="through a shell"):
        experiment(load(None, ["tune.pruner=none"]), name="search", args=["trial", word])


def test_names() -> None:
    assert "more than 40" in refusal(name="a" * 41)
    made(name="a" * 40)
    assert "--name" in refusal("cluster.job.train=trainjob", "cluster.job.nodes=500", name="a" * 40)
    assert "must be lower-case" in refusal(name="Search")


def test_placeholders_in_texts_of_the_user_are_refused() -> None:
    assert "not declared" in refusal("cluster.job.env={X: '${trialParameters.secret}'}")
