"""Read params.yaml and `section.key=value` overrides into `Params`, with errors that name the key and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainer.config import Params
from trainer.config.model import FAMILIES, NgramBag
from trainer.config.names import nearest
from trainer.errors import ConfigError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without aliases (a file of 1 kB could otherwise expand to gigabytes) and with 1e-3 read as a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} appears twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


# YAML 1.1, PyYAML's, reads 1e-3 as text; YAML 1.2 and everybody's expectation is a number.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text safely; `where` names it in errors.

    Raises:
        ConfigError: it is not YAML, too large, or uses aliases or duplicate keys.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES} characters", "a configuration is a few kilobytes")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: not valid YAML: {' '.join(str(error).split())}", "check indentation and colons"
        ) from None


def read_tree(path: str | Path) -> dict[str, Any]:
    """The sections of a params.yaml as plain dicts, not yet validated."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "write one with `millrace preset use text-classify`") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", "check the path and its permissions") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: must be a mapping of sections", "start lines with a section such as `train:`")
    return tree


def parse_override(word: str) -> tuple[str, Any]:
    """`train.lr=1e-3` -> ("train.lr", 0.001). The value is YAML, so lists are written `[1, 2]`.

    Raises:
        ConfigError: the word is not of the form section.key=value.
    """
    key, sep, value = word.partition("=")
    key = key.strip()
    if not sep or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)+", key):
        raise ConfigError(f"override {word!r} is not of the form section.key=value", "for example train.lr=1e-3")
    return key, parse_yaml(value, f"override {key}") if value.strip() else ""


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with the overrides set. Choosing another model family drops the old family's parameters.

    Args:
        tree: sections as plain dicts.
        overrides: words `section.key=value`, or a mapping of dotted keys to values.
    """
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [parse_override(word) for word in overrides]
    result = _copy(tree)
    # The family first: which other keys exist depends on it.
    for key, value in sorted(pairs, key=lambda pair: pair[0] not in ("model.name", "distill.student.name")):
        *parents, leaf = _split(key)
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"{key}: {parent} is a value, not a section", "run with --print-config to see the tree"
                )
        if leaf == "name" and value in FAMILIES and node.get("name", value) != value:
            allowed = FAMILIES[value][0].model_fields
            for stale in [name for name in node if name not in allowed]:
                del node[stale]
        node[leaf] = value
    return result


def _split(key: str) -> list[str]:
    """Split a dotted key; what follows `tune.space.` and precedes the dimension's own field is one name."""
    parts = key.split(".")
    if parts[:2] == ["tune", "space"] and len(parts) > 3:
        return ["tune", "space", ".".join(parts[2:-1]), parts[-1]]
    return parts


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(item) if isinstance(item, dict) else item for key, item in value.items()}


def validate(tree: Mapping[str, Any], where: str = "params.yaml") -> Params:
    """Check a tree against the schema.

    Raises:
        ConfigError: with one line for each wrong key: its dotted path, what is wrong, and the nearest name or the bound.
    """
    named = _copy(dict(tree))
    for family in (
        named.get("model"),
        (named.get("distill") or {}).get("student") if isinstance(named.get("distill"), dict) else None,
    ):
        if isinstance(family, dict):
            family.setdefault("name", NgramBag().name)
    try:
        params = Params.model_validate(named)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors(include_url=False)]
        raise ConfigError(
            f"{where}: " + "\n  ".join(lines), "`millrace config` prints every key with its default"
        ) from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply", "sections nest at most three levels") from None
    for key in params.tune.space:
        _check_dimension(params, key)
    return params


def load(path: str | Path | None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Params:
    """Read, override and check a configuration; `path` None starts from the defaults.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    tree = read_tree(path) if path else {}
    return validate(apply_overrides(tree, overrides), str(path or "defaults"))


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """A copy of `params` with dotted keys set, checked again."""
    return validate(apply_overrides(params.model_dump(mode="json"), values), "values")


def dump(params: Params) -> str:
    """The resolved tree as YAML: `load` reads it back to an equal `Params`."""
    return str(yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    # The union of families puts the family's name into the path, which nobody typed.
    path = [part for i, part in enumerate(path) if not (part in FAMILIES and i and path[i - 1] in ("model", "student"))]
    dotted = ".".join(path) or "(top level)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{dotted}: unknown key; {nearest(path[-1], _keys_at(item['loc'][:-1]))}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = item.get("ctx", {}).get("tag")
        what = (
            f"{given!r} is not a model family; {nearest(given, FAMILIES)}"
            if given
            else f"missing; known: {', '.join(FAMILIES)}"
        )
        return f"{dotted}.name: {what}"
    given = repr(item.get("input"))
    return f"{dotted}: {message}" + (f" (given {given})" if len(given) <= 60 and item["type"] != "value_error" else "")


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section at a validation error's location."""
    model: Any = Params
    for part in loc:
        if part in FAMILIES:
            model = FAMILIES[part][0]
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _section_of(field) if field else model
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _section_of(field: FieldInfo) -> Any:
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        return field.annotation
    sections = [arg for arg in get_args(field.annotation) if isinstance(arg, type) and issubclass(arg, BaseModel)]
    return sections[0] if sections else None


def _check_dimension(params: Params, key: str) -> None:
    """A dimension must name an existing scalar of the sections that a trial may change."""
    head, *rest = key.split(".")
    if head not in ("model", "train") or not rest:
        raise ConfigError(f"tune.space.{key}: a dimension must be a key of model or train", "for example train.lr")
    node: Any = getattr(params, head)
    for part in rest:
        fields = type(node).model_fields if isinstance(node, BaseModel) else {}
        if part not in fields:
            raise ConfigError(f"tune.space.{key}: unknown key {part!r}; {nearest(part, fields)}", "correct the name")
        node = getattr(node, part)
