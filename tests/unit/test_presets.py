"""Presets: complete, valid, commented, and what `preset use` writes."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from components.launch import spec
from trainer import executor, presets
from trainer.config import Params
from trainer.config.load import load, validate, with_values
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError
from trainer.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]


def leaves(section: BaseModel, prefix: str = "") -> set[str]:
    found = set()
    for name in type(section).model_fields:
        value = getattr(section, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}"}
    return found


def keys_of(tree: dict, known: set[str], prefix: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= keys_of(value, known, f"{path}.") if isinstance(value, dict) and path not in known else {path}
    return found


@pytest.mark.parametrize("name", presets.names())
def test_preset_is_valid_and_complete(name: str) -> None:
    tree = parse_yaml(presets.text(name), name)
    params = validate(tree, name)
    known = leaves(params)
    assert keys_of(tree, known) == known


@pytest.mark.parametrize("name", presets.names())
def test_the_sections_that_a_pod_gets_are_enough_for_its_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = validate(parse_yaml(presets.text(name), name))
    if whole.task.name == "lm":
        # Slices that sequences of the default length could not be cut into.
        whole = with_values(whole, {"parallel.cp": 3, "data.max_length": 120})
    for stage, row in STAGES.items():
        text = spec.sections(whole, stage)
        monkeypatch.setenv(spec.PARAMS_ENV, text)
        values = {executor.SECTION.format(section): json.dumps(each) for section, each in json.loads(text).items()}
        given = json.dumps({"inputs": {"parameterValues": values}})
        for params in (load(f"env:{spec.PARAMS_ENV}", ["train.seed=7"]), executor.parameters(given, ["train.seed=7"])):
            again = with_values(params, {"train.seed": whole.train.seed})
            for section in row.sections:
                assert getattr(again, section) == getattr(whole, section), (stage, section)


@pytest.mark.parametrize("name", presets.names())
def test_every_key_of_a_preset_has_a_comment_above_it(name: str) -> None:
    lines = presets.text(name).splitlines()
    silent = []
    for number, line in enumerate(lines):
        key = line.strip().split(":")[0]
        if not key or line.strip().startswith(("#", "-")) or "." in key:  # dimensions are explained at `space`
            continue
        if not lines[number - 1].strip().startswith("#"):
            silent.append(line)
    assert not silent


@pytest.mark.parametrize("name", presets.names())
def test_summary_is_one_plain_sentence(name: str) -> None:
    assert 20 < len(presets.summary(name)) < 121
    assert presets.summary(name).endswith(".")


def test_params_yaml_is_the_default_preset() -> None:
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == presets.text(presets.DEFAULT)


def test_default_preset_comes_first() -> None:
    assert presets.names()[0] == presets.DEFAULT
    assert {"text-classify", "debian-sections"} <= set(presets.names())


def test_models_of_presets_do_not_share_a_name_in_the_registry() -> None:
    models = [parse_yaml(presets.text(name), name)["promote"]["model"] for name in presets.names()]
    assert len(set(models)) == len(models)


def test_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'text-classify'"):
        presets.text("text-clasify")


@pytest.mark.parametrize("name", ["../params", "", ".", "text-classify.yaml", "/etc/passwd"])
def test_name_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(ConfigError):
        presets.text(name)


def test_use_writes_the_text_as_it_is(tmp_path: Path) -> None:
    presets.use("debian-sections", tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == presets.text("debian-sections")


def test_default_student_is_at_most_half_the_teacher() -> None:
    params = validate(parse_yaml(presets.text(presets.DEFAULT), ""), "")
    assert isinstance(params, Params)
    assert params.distill.enabled
    assert params.quantize.enabled
    assert params.tune.enabled
