"""The stage tune on a real, tiny dataset, and the page of plots."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from tests.tiny import tiny_dataset
from trainer.artifacts import manifest
from trainer.config.load import validate
from trainer.errors import MillraceError
from trainer.stage import execute
from trainer.tune import plots, stage

TREE = {
    "model": {"name": "ngram", "buckets": 256, "dim": 8},
    "train": {"epochs": 2, "batch_size": 32, "threads": 1, "lr": 0.02},
    "tune": {"trials": 3, "space": {"train.lr": {"low": 1e-3, "high": 1e-1, "log": True}}, "pruner": "none"},
}


def tune(tmp_path, out="tuning", **changes):
    dataset = tmp_path / "dataset"
    if not dataset.exists():
        tiny_dataset(dataset, "classify", 120)
    params = validate(TREE | {"tune": TREE["tune"] | changes})
    result = execute("tune", params, {"dataset": str(dataset)}, {"tuning": str(tmp_path / out)})
    return tmp_path / out, result


def test_the_stage_writes_the_best_of_its_trials(tmp_path):
    folder, result = tune(tmp_path)
    best = json.loads((folder / "best.json").read_text())
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == 3
    assert trials[0]["params"] == {"train.lr": 0.02}  # the configured value
    assert best["value"] == max(each["value"] for each in trials)
    assert best["params"] == trials[best["trial"]]["params"]
    assert result.metrics["best_val_accuracy"] == best["value"] > 0.3
    assert not (tmp_path / ".scratch").exists() or not any((tmp_path / ".scratch").rglob("journal*"))


def test_the_same_search_has_the_same_digest(tmp_path):
    digests = {manifest.read(tune(tmp_path, out)[0]).digest for out in ("one", "two")}
    assert len(digests) == 1


def test_fewer_rows_and_steps_make_a_trial_cheaper(tmp_path):
    folder, _ = tune(tmp_path, rows=20, max_steps=3, trials=1)
    trial = json.loads((folder / "trials.jsonl").read_text())
    assert set(trial["evaluations"]) == {"1", "2", "3"}  # 20 rows are one step an epoch


def test_a_search_that_is_off_leaves_the_parameters(tmp_path):
    folder, _ = tune(tmp_path, enabled=False)
    assert json.loads((folder / "best.json").read_text())["params"] == {}
    assert "switched off" in (folder / "search.html").read_text()


def test_a_metric_of_another_task_is_an_error_and_no_failed_trial(tmp_path):
    with pytest.raises(
        MillraceError, match=r"tune\.metric: task 'classify' has no metric 'val_bits_per_byte'"
    ) as caught:
        tune(tmp_path, metric="val_bits_per_byte", direction="minimize")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "tuning").exists()


def test_a_space_in_which_all_diverges_says_so(tmp_path):
    space = {"train.lr": {"low": 99.0, "high": 100.0}}
    tiny_dataset(tmp_path / "dataset", "classify", 120)
    params = validate(
        TREE
        | {"train": TREE["train"] | {"optimizer": "sgd", "clip": 0.0, "epochs": 20, "lr": 99.5}}
        | {"tune": TREE["tune"] | {"space": space}}
        | {"model": {"name": "encoder", "dim": 16, "ff": 32, "layers": 4}}
    )
    with pytest.raises(MillraceError, match="none of the 3 trials has a score") as caught:
        execute("tune", params, {"dataset": str(tmp_path / "dataset")}, {"tuning": str(tmp_path / "tuning")})
    assert caught.value.exit_code == 3
    assert "is not finite" in str(caught.value)


def data(num_dimensions: int, trials: list[dict]) -> dict:
    space = {
        f"train.key<{i}>": {"type": "float", "low": 0.0, "high": 1.0, "log": False, "choices": []}
        for i in range(num_dimensions)
    }
    done = [each for each in trials if each["value"] is not None]
    best = max(done, key=lambda each: each["value"]) if done else {"params": {}, "value": None, "number": None}
    return {
        "metric": "val_accuracy", "direction": "maximize", "sampler": "tpe", "pruner": "none", "seed": 0, "space": space,
        "trials": trials, "importance": dict.fromkeys(space, 0.5) if done else {},
        "best": {"params": best["params"], "value": best["value"], "trial": best["number"]},
    }  # fmt: skip


def trial(number: int, value: float | None, num_dimensions: int, state: str = "complete") -> dict:
    params = {f"train.key<{i}>": (number * 0.37 + i * 0.11) % 1 for i in range(num_dimensions)}
    return {
        "number": number,
        "state": state,
        "value": value,
        "params": params,
        "reason": "<script>alert(1)</script>",
        "seconds": 1.0,
        "evaluations": {},
    }


CASES = {
    "no trials": data(1, []),
    "one trial": data(1, [trial(0, 0.5, 1)]),
    "equal values": data(2, [trial(i, 0.0, 2) for i in range(3)]),
    "many": data(
        6, [trial(i, None if i % 3 == 0 else i / 40, 6, "failed" if i % 3 == 0 else "complete") for i in range(40)]
    ),
    "all failed": data(2, [trial(i, None, 2, "failed") for i in range(3)]),
}


@pytest.mark.parametrize("case", CASES)
def test_plots_are_well_formed_and_stay_inside(case):
    for plot in (plots.history, plots.importance, plots.parallel):
        root = ET.fromstring(plot(CASES[case]))  # raises on an unescaped name
        _, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter():
            for name in ("cx", "x", "x1"):
                assert 0 <= float(element.get(name, 0)) <= width
            for name in ("cy", "y", "y1"):
                assert 0 <= float(element.get(name, 0)) <= height


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained(case):
    page = plots.page(CASES[case])
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert "prefers-color-scheme:dark" in page
    assert page.count("<svg") == 3


def test_history_follows_the_best_so_far():
    found = plots.history(data(1, [trial(i, value, 1) for i, value in enumerate([0.2, 0.5, 0.3, 0.6])]))
    assert found.count('class="best-dot"') == 3
    assert found.count('class="dot"') == 1


def test_a_trial_has_its_share_of_the_least_number_of_steps():
    params = validate({"train": {"epochs": 8, "min_steps": 400}, "tune": {"epochs": 2}})
    assert stage._fidelity(params) == {"train.epochs": 2, "train.min_steps": 100}
    assert stage._fidelity(validate({"train": {"min_steps": 400}, "tune": {"epochs": 0}})) == {}
