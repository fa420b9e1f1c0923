"""Ten thousand random configurations: a valid one with one thing broken is refused by its path; only ConfigError escapes."""

import random
import string
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config.load import apply_overrides, dump, load, validate
from trainer.config.model import FAMILIES
from trainer.config.text import dump_yaml, parse_value, parse_yaml
from trainer.errors import ConfigError

# A valid configuration of each task and family, from which the random ones are made.
BASES = [
    load(None, [f"task.name={learns[0]}", f"model.name={name}", f"distill.student.name={name}"]).model_dump(mode="json")
    for name, (_, _, learns) in FAMILIES.items()
]
# Values that no parameter takes, whatever its type: wrong kinds of number, text or structure for all of them.
NEVER = [
    float("nan"),
    float("inf"),
    -float("inf"),
    2**64,
    -(2**64),
    {},
    {"x": 1},
    [[]],
    [None],
    b"x",
    object(),
    {1},
    "\0",
    "\ud800",
]


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def copied(tree):
    return {key: copied(value) if isinstance(value, dict) else value for key, value in tree.items()}


def wrong_for(value, generator):
    """A value of another type than the given one, which the parameter cannot take."""
    if isinstance(value, bool):
        return generator.choice([1, 0.5, "true", None, [True], *NEVER])
    if isinstance(value, (int, float)):
        return generator.choice([True, "1", "x", None, [1], -1e300, *NEVER])
    if isinstance(value, str):
        return generator.choice([True, 1, 0.5, None, ["x"], *NEVER])
    if isinstance(value, list):
        return generator.choice([True, 1, "x", None, [{"x": 1}], *NEVER])
    return generator.choice([b"x", object(), "\0", float("nan"), [1], {"x": []}])  # null: an optional number


def mutated(generator):
    """(configuration, path that an error must name)."""
    tree = copied(generator.choice(BASES))
    path = generator.choice(list(leaves(tree)))
    kind = generator.randrange(4)
    if kind == 0:
        at(tree, path[:-1])[path[-1]] = wrong_for(at(tree, path), generator)
        # Another family or type of dimension is judged first, where it stands.
        return tree, path
    depth = generator.randrange(len(path))
    if path[:2] == ("tune", "space") and depth == 2:
        depth = 3  # a dimension may have any name; whether it exists is checked when all else is right
    node = at(tree, path[:depth])
    if kind == 1:
        key = "".join(generator.choices(string.ascii_lowercase, k=12))
        node[key] = generator.choice([1, "x", None, {}, [], True])
        return tree, (*path[:depth], key)
    if kind == 2 and depth:
        parent = at(tree, path[: depth - 1])
        parent[path[depth - 1]] = generator.choice([None, 1, "x", [], [1], True, b"x"])
        return tree, path[:depth]
    key = generator.choice([1, None, True, 1.5, "\0", ("a", "b")])
    node[key] = 1
    return tree, path[:depth]


def test_ten_thousand_broken_configurations_are_refused_by_their_path():
    generator = random.Random(3)
    for number in range(10_000):
        tree, path = mutated(generator)
        with pytest.raises(ConfigError) as caught:
            validate(tree)
        named = path[:3] if path[:2] == ("tune", "space") else path  # low, high and choices are judged together
        assert ".".join(named) in caught.value.message, (number, path)


def test_unbroken_configurations_are_accepted():
    for tree in BASES:
        assert validate(tree).model_dump(mode="json") == tree


SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=12)
KEYS = st.sampled_from(sorted({key for tree in BASES for path in leaves(tree) for key in path})) | st.text(max_size=8)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEYS, TREES, max_size=4), st.lists(st.text(max_size=20), max_size=2))
def test_random_trees_and_words_raise_nothing_but_a_configuration_error(tree, words):
    with suppress(ConfigError):
        validate(apply_overrides(tree, words))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.text(alphabet=st.sampled_from("train: lr{}[],\n\"'#&*!|>-~01.e\\\t%@?\0\ue000 "), max_size=60))
def test_random_text_raises_nothing_but_a_configuration_error(text):
    for parse in (parse_yaml, parse_value):
        with suppress(ConfigError):
            parse(text, "text")


PLAIN = st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
) | st.from_regex(
    r"[-+0-9._eExo:~]{1,8}|yes|no|on|off|y|n|null|true|=|<<|\.inf|[0-9]{4}-[0-9]{2}-[0-9]{2}", fullmatch=True
)
FLOATS = st.floats(1e-300, 100.0, allow_nan=False)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        PLAIN, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN | st.booleans(), max_size=4
    )
)
def test_dumped_values_are_read_back(tree):
    tree = {"values": list(tree.values()), "keys": list(tree)}
    assert parse_yaml(dump_yaml(tree), "dump") == tree


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(PLAIN, FLOATS)
def test_dumped_parameters_are_read_back(text, number):
    params = validate({"data": {"text": text, "label": text}, "train": {"lr": number}})
    assert validate(parse_yaml(dump(params), "dump")) == params
