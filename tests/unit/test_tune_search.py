"""The local search: deterministic, resumable, and never misled by a trial that failed."""

import math

import pytest

from trainer.config.stages import Dimension, Tune
from trainer.errors import DivergedError, MillraceError, Preempted
from trainer.tune.search import MAX_ATTEMPTS, SearchError, best_of, search

SPACE = {
    "train.lr": Dimension(low=1e-4, high=1.0, log=True),
    "train.clip": Dimension(low=0, high=1, step=0.25),
    "model.dim": Dimension(type="int", low=1, high=9, step=2),
    "train.optimizer": Dimension(type="categorical", choices=("adam", "sgd")),
}
GRID = {key: SPACE[key] for key in ("train.clip", "train.optimizer")}


def make(**changes) -> Tune:
    sampler = changes.get("sampler", "tpe")
    return Tune(**({"trials": 9, "sampler": sampler, "space": GRID if sampler == "grid" else SPACE} | changes))


def score(values: dict) -> float:
    return 1.0 - abs(math.log10(values.get("train.lr", 0.01)) + 2) / 4 - values["train.clip"] / 3


def objective(number, values, report):
    for evaluation in range(3):
        report(evaluation * 10, score(values) * (evaluation + 1) / 3)
    return score(values)


def facts(found):
    return [(each.number, each.state, each.value, each.params, each.reason, each.evaluations) for each in found.trials]


class Killed(BaseException):
    """Ends the process as far as the search can tell."""


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [("grid", "none"), ("random", "hyperband"), ("tpe", "median"), ("tpe", "hyperband"), ("gp", "median")],
)
def test_a_search_killed_in_any_trial_finds_what_an_undisturbed_one_finds(tmp_path, sampler, pruner):
    trials = 4 if sampler == "gp" else 6  # fitting the GP takes time
    tune = make(sampler=sampler, pruner=pruner, trials=trials)
    whole = search(tune, objective, tmp_path / "whole", evaluations=3)
    assert len(whole.trials) == trials
    for left in (1, 2, 2, 4)[: trials - 2]:

        def dying(number, values, report, left=left):
            if number != left:
                return objective(number, values, report)
            try:
                report(0, score(values) / 3)
            finally:
                raise Killed

        with pytest.raises(Killed):
            search(tune, dying, tmp_path / "killed", evaluations=3)
    resumed = search(tune, objective, tmp_path / "killed", evaluations=3)
    assert facts(resumed) == facts(whole)
    assert resumed.best.number == whole.best.number
    assert resumed.importance == whole.importance


def test_gp_does_not_propose_what_was_pruned_or_failed_again(tmp_path):
    def losing(number, values, report):
        if number < 4:
            return objective(number, values, report)
        report(0, 0.0)
        if number % 2:
            raise RuntimeError
        report(1, 0.0)
        return 0.0

    found = search(make(sampler="gp", pruner="median", trials=8), losing, tmp_path)
    points = {tuple(f"{value}"[:6] for value in each.params.values()) for each in found.trials[4:]}
    assert len(points) == 4


def test_another_seed_gives_other_trials(tmp_path):
    one, two = (search(make(seed=seed), objective, tmp_path / str(seed)) for seed in (0, 1))
    assert [each.params for each in one.trials] != [each.params for each in two.trials]


@pytest.mark.parametrize("cut", [1, 20, 60, 200])
def test_a_journal_cut_in_a_line_goes_on(tmp_path, cut):
    tune = make(pruner="none", trials=5)
    whole = search(tune, objective, tmp_path / "whole")
    search(make(pruner="none", trials=3), objective, tmp_path / "cut")
    path = tmp_path / "cut" / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    (tmp_path / "cut" / "journal.jsonl.lock").symlink_to("nothing")  # held by a process that died with it
    resumed = search(tune, objective, tmp_path / "cut")
    assert [each.params for each in resumed.trials] == [each.params for each in whole.trials]
    assert resumed.best.params == whole.best.params


def test_a_finished_search_runs_no_trial_again(tmp_path):
    tune = make()
    search(tune, objective, tmp_path)

    def never(number, values, report):
        raise AssertionError("ran again")

    assert len(search(tune, never, tmp_path).trials) == 9


FAILURES = {
    "an exception": (RuntimeError("no\nroom"), "RuntimeError: no room"),
    "divergence": (DivergedError("step 3: loss nan"), "DivergedError: step 3: loss nan"),
    "a parameter that does not fit": (MillraceError("heads must divide dim"), "MillraceError: heads must divide dim"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_trial_that_fails_has_a_reason_and_no_score(tmp_path, case):
    error, reason = FAILURES[case]

    def failing(number, values, report):
        if number == 2:
            report(0, 99.0)
            raise error
        return objective(number, values, report)

    found = search(make(pruner="none"), failing, tmp_path)
    assert (found.trials[2].state, found.trials[2].value, found.trials[2].reason) == ("failed", None, reason)
    assert found.best.number != 2
    assert [each.state for each in found.trials].count("complete") == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure(tmp_path, value):
    found = search(make(), lambda number, values, report: value if number % 2 else 0.5, tmp_path)
    assert {each.state for each in found.trials[1::2]} == {"failed"}
    assert found.best.value == 0.5


def test_when_all_trials_fail_the_error_names_the_reasons(tmp_path):
    def failing(number, values, report):
        raise ValueError("odd" if number % 2 else "even")

    with pytest.raises(MillraceError, match="none of the 9 trials has a score") as caught:
        search(make(), failing, tmp_path)
    assert caught.value.exit_code == 2
    assert "trial 1, 3, 5, 7: ValueError: odd" in str(caught.value)


def test_when_all_trials_diverge_the_exit_code_says_so(tmp_path):
    def diverging(number, values, report):
        raise DivergedError("loss nan")

    with pytest.raises(DivergedError) as caught:
        search(make(trials=3), diverging, tmp_path)
    assert caught.value.exit_code == 3


def test_minimising_takes_the_smallest(tmp_path):
    tune = make(metric="val_loss", direction="minimize", pruner="none")
    found = search(tune, lambda number, values, report: abs(number - 4.0), tmp_path)
    assert found.best.number == 4


def test_the_first_of_equals_is_best(tmp_path):
    found = search(make(pruner="none"), lambda number, values, report: float(number >= 2), tmp_path)
    assert found.best.number == 2


def test_a_pruned_trial_is_never_best(tmp_path):
    def falling(number, values, report):
        for evaluation in range(6):
            report(evaluation, -float(number))
        return float(number)

    found = search(make(pruner="median"), falling, tmp_path)
    pruned = [each for each in found.trials if each.state == "pruned"]
    assert pruned
    assert all(each.value is None for each in pruned)
    assert found.best.state == "complete"


def test_a_grid_runs_each_point_once_and_no_more(tmp_path):
    found = search(make(sampler="grid", trials=50, pruner="none"), objective, tmp_path)
    points = [tuple(sorted(each.params.items())) for each in found.trials]
    assert len(points) == len(set(points)) == 10


def test_the_configured_values_are_the_first_trial(tmp_path):
    first = {"train.lr": 0.02, "train.clip": 0.5, "model.dim": 3, "train.optimizer": "sgd"}
    found = search(make(), objective, tmp_path, first=first)
    assert found.trials[0].params == first
    assert found.trials[1].params != first


def test_an_error_of_the_search_itself_is_no_failed_trial(tmp_path):
    def wrong(number, values, report):
        raise SearchError("no such metric")

    with pytest.raises(SearchError):
        search(make(), wrong, tmp_path)
    assert len(search(make(), objective, tmp_path).trials) == 9


def test_a_trial_whose_process_always_dies_is_given_up(tmp_path):
    def dying(number, values, report):
        if number == 1:
            raise Killed
        return objective(number, values, report)

    deaths = 0
    while True:
        try:
            found = search(make(pruner="none", trials=3), dying, tmp_path)
            break
        except Killed:
            deaths += 1
            assert deaths <= MAX_ATTEMPTS
    assert deaths == MAX_ATTEMPTS
    assert found.trials[1].state == "failed"
    assert "died 10 times" in found.trials[1].reason


def test_preemption_does_not_count_as_a_death(tmp_path):
    def preempted(number, values, report):
        raise Preempted("SIGTERM")

    for _ in range(2 * MAX_ATTEMPTS):
        with pytest.raises(Preempted):
            search(make(trials=2), preempted, tmp_path)
    assert [each.state for each in search(make(trials=2), objective, tmp_path).trials] == ["complete", "complete"]


def test_evaluations_are_counted_not_timed(tmp_path):
    def uneven(number, values, report):
        for evaluation in range(3):
            report(evaluation * (number + 1) * 7, 0.5)
        return 0.5

    found = search(make(pruner="none", trials=4), uneven, tmp_path)
    assert all(set(each.evaluations) == {1, 2, 3} for each in found.trials)


def test_importance_finds_the_dimension_that_matters(tmp_path):
    found = search(
        make(sampler="random", trials=30, pruner="none"), lambda n, values, r: values["train.clip"], tmp_path
    )
    assert max(found.importance, key=found.importance.get) == "train.clip"
    assert found.importance["train.clip"] > 0.8


def test_no_trials_have_no_best():
    with pytest.raises(MillraceError):
        best_of([], "maximize")
