"""The search space as Optuna distributions and as a grid."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Params
from trainer.config.load import validate
from trainer.config.stages import Dimension, Tune
from trainer.errors import ConfigError
from trainer.tune import space


def tune(**dimensions: dict) -> Tune:
    return Tune(space={f"train.{key}": Dimension(**value) for key, value in dimensions.items()})


def test_a_step_that_does_not_reach_high_stops_below_it():
    found = space.distributions(
        tune(lr={"low": 0.1, "high": 0.35, "step": 0.1}, batch_size={"type": "int", "low": 1, "high": 8, "step": 3})
    )
    assert found["train.lr"].high == 0.3
    assert found["train.batch_size"].high == 7


def test_steps_are_decimal_numbers():
    assert space.grid_values("train.lr", Dimension(low=0.1, high=0.7, step=0.1)) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_a_grid_is_the_product_of_its_axes():
    points = space.grid(
        tune(clip={"low": 0, "high": 1, "step": 0.5}, optimizer={"type": "categorical", "choices": ("adam", "sgd")})
    )
    assert len(points) == 6
    assert points[1] == {"train.clip": 0.0, "train.optimizer": "sgd"}


@pytest.mark.parametrize("dimension", [{"low": 0.1, "high": 1.0}, {"low": 1, "high": 64, "type": "int", "log": True}])
def test_a_grid_over_a_continuous_dimension_is_refused_by_name(dimension):
    with pytest.raises(ConfigError, match=r"tune\.space\.train\.lr: a grid needs a step"):
        space.grid(tune(lr=dimension))


def test_a_grid_that_would_not_fit_into_memory_is_refused():
    wide = {"type": "int", "low": 0, "high": 999}
    with pytest.raises(ConfigError, match="1000000000 points"):
        space.grid(tune(a=wide, b=wide, c=wide))


CONFIGURED = {
    "inside": ({"low": 0.5, "high": 2.0}, 1.0, True),
    "below": ({"low": 1.5, "high": 2.0}, 1.0, False),
    "off the step": ({"low": 0.0, "high": 1.2, "step": 0.3}, 1.0, False),
    "on the step": ({"low": 0.0, "high": 1.2, "step": 0.1}, 0.7, True),
    "a choice": ({"type": "categorical", "choices": [0.0, 1.0]}, 1.0, True),
    "no choice": ({"type": "categorical", "choices": [0.0, 2.0]}, 1.0, False),
}


@pytest.mark.parametrize("case", CONFIGURED)
def test_the_configured_point_is_taken_only_if_it_lies_in_the_space(case):
    dimension, value, inside = CONFIGURED[case]
    params = validate({"train": {"clip": value}, "tune": {"space": {"train.clip": dimension}}})
    found = space.configured(params.tune, params.model_dump(mode="json"))
    assert found == ({"train.clip": value} if inside else None)


def test_the_configured_point_has_the_types_of_its_dimensions():
    params = validate({"tune": {"space": {"train.batch_size": {"type": "int", "low": 1, "high": 128}}}})
    found = space.configured(params.tune, params.model_dump(mode="json"))
    assert type(found["train.batch_size"]) is int


def test_a_categorical_true_is_not_the_number_one():
    assert space.configured(tune(x={"type": "categorical", "choices": (True,)}), {"train": {"x": 1}}) is None


@settings(max_examples=60, deadline=None)
@given(
    low=st.integers(-50, 50), count=st.integers(1, 40), step=st.integers(1, 7), kind=st.sampled_from(["int", "float"])
)
def test_every_grid_value_is_in_the_distribution(low, count, step, kind):
    dimension = Dimension(type=kind, low=low, high=low + count, step=step)
    found = space.distribution(dimension)
    for value in space.grid_values("x", dimension):
        assert found._contains(found.to_internal_repr(value))
        assert low <= value <= low + count


def test_defaults_make_a_space():
    assert set(space.distributions(Params().tune)) == {"train.lr"}


def test_what_is_configured_outside_of_the_space_is_named():
    dimensions = tune(
        lr={"low": 0.02, "high": 0.05},
        clip={"low": 0.0, "high": 1.0},
        optimizer={"type": "categorical", "choices": ("adam", "sgd")},
    )
    tree = {"train": {"lr": 0.01, "clip": 0.5, "optimizer": "muon"}}
    assert space.outside(dimensions, tree) == [
        "train.lr=0.01 (the search: 0.02 to 0.05)",
        "train.optimizer=muon (the search: adam, sgd)",
    ]
    assert space.outside(dimensions, {"train": {"lr": 0.03, "clip": 0.5, "optimizer": "sgd"}}) == []
