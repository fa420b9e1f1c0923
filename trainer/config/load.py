"""Read params.yaml and `section.key=value` overrides into `Params`, with errors that name the key and the fix."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from trainer.config import Data, Params, Task
from trainer.config.explain import explain
from trainer.config.model import FAMILIES, NgramBag
from trainer.config.names import nearest, shown
from trainer.config.plain import plain
from trainer.config.text import dump_yaml, parse_value, parse_yaml, read_text
from trainer.errors import ConfigError

MAX_LINES = 10
COMMAND_LINE = "command line"
# `--params env:NAME`: pods get their configuration in a variable, which needs no file and no quoting.
ENVIRONMENT = "env:"


def read_tree(path: str | Path) -> dict[str, Any]:
    """The sections of a params.yaml as plain dicts, not yet validated.

    Raises:
        ConfigError: the file cannot be read, holds nothing, or is no mapping of sections.
    """
    tree = parse_yaml(_text_of(str(path)), str(path))
    if tree is None:
        raise ConfigError(
            f"{path}: empty", "write it with `millrace preset use text-classify`, or write {} for defaults"
        )
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections", "start lines with a section such as `train:`")
    return dict(plain(tree))


def _text_of(path: str) -> str:
    """The text of a file, or of the environment variable that `env:NAME` names."""
    if not path.startswith(ENVIRONMENT):
        return read_text(Path(path))
    name = path.removeprefix(ENVIRONMENT)
    if name not in os.environ:
        raise ConfigError(
            f"--params {path}: there is no such environment variable", f"set {name} to a params.yaml's text"
        )
    return os.environ[name]


def parse_override(word: str) -> tuple[str, Any]:
    """`train.lr=1e-3` -> ("train.lr", 0.001). The value is YAML, so lists are written `[1, 2]`.

    Raises:
        ConfigError: the word is not of the form section.key=value.
    """
    key, sep, value = word.partition("=")
    key = key.strip()
    if not sep or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+){1,8}", key):
        message = f"override {shown(word)} is not of the form section.key=value"
        raise ConfigError(message, "for example train.lr=1e-3")
    return key, parse_value(value, f"override {key}")


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with the overrides set. Choosing another model family drops the old family's parameters.

    Args:
        tree: sections as plain dicts.
        overrides: words `section.key=value`, or a mapping of dotted keys to values.

    Raises:
        ConfigError: a word is malformed, or leads through a value that is not a section.
    """
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [parse_override(word) for word in overrides]
    result: dict[str, Any] = plain(tree)
    families = ("model.name", "distill.student.name")
    # The family first: which other keys exist depends on it.
    for key, value in sorted(pairs, key=lambda pair: pair[0] not in families):
        *parents, leaf = _split(key)
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                message = f"{key}: {parent} is a value, not a section"
                raise ConfigError(message, "run with --print-config to see the tree")
        if key in families and node.get("name", NgramBag().name) != value:
            _drop_stale(node, value)
        node[leaf] = plain(value, key)
    return result


def _drop_stale(node: dict[str, Any], family: Any) -> None:
    """Remove the parameters that the family does not have."""
    if isinstance(family, str) and family in FAMILIES:
        for name in set(node) - set(FAMILIES[family][0].model_fields):
            del node[name]


def _split(key: str) -> list[str]:
    """Split a dotted key; what follows `tune.space.` and precedes the dimension's own field is one name."""
    parts = key.split(".")
    if parts[:2] == ["tune", "space"] and len(parts) > 3:
        return ["tune", "space", ".".join(parts[2:-1]), parts[-1]]
    return parts


def validate(tree: Mapping[str, Any], where: str = "params.yaml") -> Params:
    """Check a tree against the schema. Types are strict: `"5"` and `true` are no numbers.

    Raises:
        ConfigError: with one line for each wrong key: its dotted path, what is wrong, and the nearest name or the bound.
    """
    named = plain(tree)
    distill = named.get("distill")
    for family in (named.get("model"), distill.get("student") if isinstance(distill, dict) else None):
        if isinstance(family, dict):
            family.setdefault("name", NgramBag().name)
    try:
        # As JSON, because lists then pass for tuples although types are strict.
        params = Params.model_validate_json(json.dumps(named), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False, include_context=True)
        lines = [explain(item) for item in items[:MAX_LINES]]
        if len(items) > MAX_LINES:
            lines.append(f"and {len(items) - MAX_LINES} more")
        message = f"{where}: " + "\n  ".join(lines)
        raise ConfigError(message, "`millrace config` prints every key with its default") from None
    for key in params.tune.space:
        _check_dimension(params, key)
    return params


def completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that a pod gets, with others that suit them in place of those that its stage does not read.

    Their defaults are those of text classification, and would be refused beside another task.
    """
    task, parallel = (each if isinstance(each, dict) else {} for each in (tree.get("task"), tree.get("parallel")))
    name, ranks = task.get("name", Task().name), parallel.get("cp", 1)
    rest: dict[str, Any] = {}
    family = next((family for family, (_, _, learns) in FAMILIES.items() if name in learns), None)
    if family:
        rest |= {"model": {"name": family}, "distill": {"student": {"name": family}}}
    if isinstance(ranks, int) and ranks > 0:
        rest["data"] = {"max_length": -(-Data().max_length // (2 * ranks)) * 2 * ranks}
    return {**{section: values for section, values in rest.items() if section not in tree}, **tree}


def load(path: str | Path | None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Params:
    """Read, override and check a configuration; `path` None starts from the defaults.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    tree = read_tree(path) if path else {}
    where = str(path or "defaults")
    words = overrides if isinstance(overrides, Mapping) else list(overrides)
    changed = apply_overrides(tree, words)
    if where.startswith(ENVIRONMENT):
        tree, changed = completed(tree), completed(changed)
    try:
        return validate(changed, where)
    except ConfigError:
        if words and not isinstance(words, Mapping) and _is_valid(tree):
            where = COMMAND_LINE
    return validate(changed, where)


def _is_valid(tree: Mapping[str, Any]) -> bool:
    try:
        validate(tree)
    except ConfigError:
        return False
    return True


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """A copy of `params` with dotted keys set, checked again."""
    return validate(apply_overrides(params.model_dump(mode="json"), values), "values")


def dump(params: Params) -> str:
    """The resolved tree as YAML: `load` reads it back to an equal `Params`."""
    return dump_yaml(params.model_dump(mode="json"))


def _check_dimension(params: Params, key: str) -> None:
    """A dimension must name an existing scalar of the sections that a trial may change, with values that it may take."""
    path = f"tune.space.{shown(key)}"
    head, *rest = key.split(".")
    if head not in ("model", "train") or not rest:
        raise ConfigError(f"{path}: a dimension must be a key of model or train", "for example train.lr")
    node: Any = getattr(params, head)
    field: Any = None
    for part in rest:
        fields = type(node).model_fields if isinstance(node, BaseModel) else {}
        if part not in fields:
            raise ConfigError(f"{path}: unknown key {shown(part)}; {nearest(part, fields)}", "correct the name")
        field, node = fields[part], getattr(node, part)
    if isinstance(node, (BaseModel, tuple)):
        raise ConfigError(
            f"{path}: not a single value, it cannot be searched", "name a number, a text or a truth value"
        )
    dimension = params.tune.space[key]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    check: TypeAdapter[Any] = TypeAdapter(kind)
    for end, value in [("low", dimension.low), ("high", dimension.high), *(("choices", v) for v in dimension.choices)]:
        try:
            if value is not None:
                check.validate_python(int(value) if dimension.type == "int" else value, strict=True)
        except ValidationError as error:
            reason = (
                error.errors(include_url=False)[0]["msg"]
                .removeprefix("Value error, ")
                .replace("Input should be", "must be")
            )
            hint = f"give values that {key} can take" + (", or type: int" if isinstance(node, int) else "")
            raise ConfigError(f"{path}.{end}: {reason} (given {value!r})", hint) from None
