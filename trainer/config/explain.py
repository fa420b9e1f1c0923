"""What a validation error says: the dotted path, what is wrong, and the nearest name or the bound."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import Params
from trainer.config.model import FAMILIES
from trainer.config.names import nearest, shown

# The keys whose value is a union of families; the location of an error below them has the family's name in it.
_UNIONS = (("model",), ("distill", "student"))


def explain(item: Any) -> str:
    """One line for an entry of `ValidationError.errors()`."""
    loc = tuple(item["loc"])
    dotted = ".".join(shown(part) for part in _typed(loc))
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "extra_forbidden":
        return f"{dotted}: unknown key; {_known(str(loc[-1]), _keys_at(loc[:-1]))}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = item.get("ctx", {}).get("tag")
        if given is None:
            return f"{dotted}.name: missing; known: {', '.join(FAMILIES)}"
        return f"{dotted}.name: {shown(given)} is not a model family; {nearest(given[:80], FAMILIES)}"
    if item["type"] in ("model_type", "model_attributes_type"):
        message = "must be a section with keys of its own"
    prefix = f"{dotted}: " if dotted else ""
    if item["type"] == "value_error":
        return prefix + message
    given = repr(item.get("input"))
    return f"{prefix}{message} (given {given if len(given) <= 60 else given[:57] + '...'})"


def _typed(loc: tuple[Any, ...]) -> list[Any]:
    """The location as a person typed it: without the names of families that the unions put into it."""
    return [part for i, part in enumerate(loc) if loc[:i] not in _UNIONS or part not in FAMILIES]


def _known(name: str, keys: list[str]) -> str:
    """The nearest of the keys, or the place elsewhere where the very same key exists."""
    elsewhere = _places().get(name)
    return f"did you mean {elsewhere!r}?" if elsewhere else nearest(name[:80], keys)


@functools.cache
def _places() -> dict[str, str]:
    """Name of a key -> the dotted path of its first place in the schema."""
    return {path.rsplit(".", 1)[-1]: path for path in reversed(list(_paths(Params, "")))}


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Dotted keys of all fields of the schema; those of the families are left out."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section_of(field)
        if section is not None and "." not in prefix:
            yield from _paths(section, f"{prefix}{name}.")


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section at a validation error's location."""
    model: Any = Params
    for i, part in enumerate(loc):
        if loc[:i] in _UNIONS and part in FAMILIES:
            model = FAMILIES[part][0]
        elif isinstance(part, str) and model is not None and part in model.model_fields:
            model = _section_of(model.model_fields[part]) or model
    return list(model.model_fields)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return sections[0] if len(sections) == 1 else None
