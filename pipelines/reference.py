"""The configuration as text, from its schema: `millrace config`, docs/configuration.md and commented YAML."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import Params
from trainer.config.model import FAMILIES
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError

_BOUNDS = ((Ge, "ge", ">= "), (Gt, "gt", "> "), (Le, "le", "<= "), (Lt, "lt", "< "), (MinLen, "min_length", "length >= "),
           (MaxLen, "max_length", "length <= "))  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A parameter: its dotted path, what it may be, its default and what it does."""

    path: str
    type: str
    bounds: str
    default: str
    help: str


def parameters(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[Key]:
    """All parameters of a section, in the order of the schema; `model` and `distill.student` once for each family."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        if path in ("model", "distill.student"):
            default = field.get_default(call_default_factory=True)
            yield Key(f"{path}.name", "string", f"one of {', '.join(FAMILIES)}", default.name, field.description or "")
            if path == "model":
                for family, (section, _, _) in FAMILIES.items():
                    for key in parameters(section, f"{path}."):
                        if key.path != f"{path}.name":
                            yield Key(f"{key.path} ({family})", key.type, key.bounds, key.default, key.help)
            else:
                yield Key(f"{path}.*", "", "", "", "The parameters of its family, as in the section `model`.")
        elif inner := _section(field.annotation):
            yield from parameters(inner, f"{path}.")
        elif item := _mapping_of_sections(field.annotation):
            yield Key(path, "mapping", "", show(_default(field)), field.description or "")
            yield from parameters(item, f"{path}.KEY.")
        else:
            yield Key(path, type_name(field.annotation), bounds(field), show(_default(field)), field.description or "")


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Mapping):
        return {
            key: item.model_dump(mode="json", exclude_defaults=True) if isinstance(item, BaseModel) else item
            for key, item in value.items()
        }
    return value


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _mapping_of_sections(annotation: Any) -> type[BaseModel] | None:
    return _section(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def show(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    if isinstance(value, float):
        text = f"{value:g}" if 1e-3 <= abs(value) < 1e6 or not value else f"{value:e}"
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if exponent else f"{float(text)}"
    if isinstance(value, str) and value and _is_plain(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    """Whether YAML reads the text as itself without quotes."""
    try:
        return bool(parse_yaml(f"key: {text}", "") == {"key": text})
    except ConfigError:
        return False


def type_name(annotation: Any) -> str:
    """A type in plain words: `int`, `list of float`, `one of adam, sgd`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping to {type_name(args[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join("empty" if arg is type(None) else type_name(arg) for arg in args)
    return {str: "string", bool: "true or false", int: "int", float: "float"}.get(annotation, str(annotation))


def bounds(field: FieldInfo) -> str:
    """Bounds in plain signs: `>= 0, < 1`."""
    found: list[str] = []
    for each in _metadata(field):
        found += [
            f"{sign}{show(getattr(each, attribute))}" for kind, attribute, sign in _BOUNDS if isinstance(each, kind)
        ]
    return ", ".join(dict.fromkeys(found))


def _metadata(field: FieldInfo) -> list[Any]:
    found = list(field.metadata)
    for args in (
        get_args(arg) for arg in (field.annotation, *get_args(field.annotation)) if get_origin(arg) is Annotated
    ):
        for each in args[1:]:
            found += each.metadata if isinstance(each, FieldInfo) else [each]
    return found


def schema() -> str:
    """JSON Schema of params.yaml, for editors."""
    return json.dumps(Params.model_json_schema(), indent=2, ensure_ascii=False)


def table() -> str:
    """Every key with type, bounds, default and help, for a terminal."""
    lines = []
    for key in parameters():
        given = ", ".join(part for part in (key.type, key.bounds) if part)
        default = f" = {key.default}" if key.default != "" else ""
        lines += [f"{key.path}{default}", f"    {given + '. ' if given else ''}{key.help}"]
    return "\n".join(lines)


def commented(params: Params) -> str:
    """A whole configuration as YAML with a comment over every key: what a preset is made from."""
    return "\n".join(_commented(params, 0)).strip() + "\n"


def _commented(section: BaseModel, depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        note = (field.description or "").strip().splitlines()
        if isinstance(value, BaseModel):
            text = (type(value).__doc__ or "").strip().splitlines()[0]
            yield from ([""] if depth == 0 else [])
            yield from (f"{pad}# {text}", f"{pad}{name}:")
            yield from _commented(value, depth + 1)
            continue
        if name == "name" and not note:
            note = [f"The family: one of {', '.join(FAMILIES)}."]
        yield from (f"{pad}# {line.strip()}" for line in note)
        if isinstance(value, Mapping) and value:
            yield f"{pad}{name}:"
            for key, item in value.items():
                plain = item.model_dump(mode="json", exclude_defaults=True) | {"type": item.type}
                inner = ", ".join(
                    f"{part}: {show(plain[part])}" for part in sorted(plain, key=list(type(item).model_fields).index)
                )
                yield f"{pad}  {key}: {{{inner}}}"
        else:
            yield f"{pad}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return show(value)
