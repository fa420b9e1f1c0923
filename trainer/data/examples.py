"""From a parsed row (an object with keys) to a text and a label, or to the reason why it has none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trainer.config.names import nearest

MAX_LABEL = 256
# Keys or columns named in one message: they come out of the file.
MAX_NAMES = 12


@dataclass(frozen=True)
class Bad:
    """A malformed row: a short kind under which it is counted, and a message for a person (which shows no data)."""

    kind: str
    message: str


@dataclass(frozen=True)
class Example:
    """A text with its label; `label` is None where the task needs none, `picture` is its file name, rows of values, or bytes."""

    text: str
    label: str | None
    picture: Any = None


def render(turns: Iterable[tuple[str, str]]) -> str:
    """A dialogue as one text, each turn under its role's tag."""
    return "\n".join(f"<|{role}|>\n{content}" for role, content in turns)


def to_example(row: Any, text_key: str, label_key: str, task: str) -> Example | Bad:
    """The example in a row: `{text, label}`, `{input, output}`, `{messages: [{role, content}]}` or `{image, label}`.

    Args:
        row: what the file holds in one row.
        text_key: key of the text.
        label_key: key of the label.
        task: classify and image need a label; lm ignores it and turns pairs and dialogues into one text.
    """
    if not isinstance(row, dict):
        return Bad("not_object", f"is a {_kind(row)}, not an object with keys")
    if task == "image":
        return _image(row, text_key, label_key)
    if text_key in row:
        text = row[text_key]
        label = row.get(label_key)
        where = f"key {text_key!r}"
        missing = label_key not in row
    elif "input" in row and "output" in row:
        return _pair(row, task)
    elif "messages" in row:
        return _dialogue(row, task)
    else:
        return _without("no_text", text_key, row)
    if not isinstance(text, str):
        return Bad("text_not_string", f"{where} is a {_kind(text)}, not a text")
    if task == "lm":
        return _checked(text, None)
    if missing:
        return _without("no_label", label_key, row)
    return _labelled(text, label, label_key)


def _without(kind: str, key: str, row: dict[str, Any]) -> Bad:
    return Bad(kind, f"has no key {key!r}; {nearest(key, [str(each) for each in row], limit=MAX_NAMES)}")


def _pair(row: dict[str, Any], task: str) -> Example | Bad:
    given, wanted = row["input"], row["output"]
    if (
        not isinstance(given, str)
        or not isinstance(wanted, (str, int, float))
        or (task == "lm" and _is_infinite(wanted))
    ):
        return Bad("text_not_string", "keys 'input' and 'output' must hold texts")
    if task == "lm":
        return _checked(render((("user", given), ("assistant", str(wanted)))), None)
    return _labelled(given, wanted, "output")


def _dialogue(row: dict[str, Any], task: str) -> Example | Bad:
    messages = row["messages"]
    if task != "lm":
        return Bad("no_label", "is a dialogue, which has no label; set task.name=lm")
    if not isinstance(messages, list) or not messages:
        return Bad("not_object", "key 'messages' must be a list of {role, content}")
    turns = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return Bad("not_object", "each of 'messages' must have a text 'role' and a text 'content'")
        turns.append((role, content))
    return _checked(render(turns), None)


def _image(row: dict[str, Any], text_key: str, label_key: str) -> Example | Bad:
    key = text_key if text_key in row else "image"
    if key not in row:
        return _without("no_text", text_key, row)
    if label_key not in row:
        return _without("no_label", label_key, row)
    picture = row[key]
    example = _labelled(picture if isinstance(picture, str) else "", row[label_key], label_key)
    return example if isinstance(example, Bad) else Example(example.text, example.label, picture)


def _labelled(text: str, label: Any, key: str) -> Example | Bad:
    if isinstance(label, bool):
        label = str(label).lower()
    elif _is_infinite(label):
        return Bad("no_label", f"key {key!r} is NaN or infinite, not a label")
    elif isinstance(label, int | float):
        label = str(label)
    if not isinstance(label, str):
        return Bad("no_label", f"key {key!r} is a {_kind(label)}, not a label")
    label = _one_line(label)
    if not label:
        return Bad("no_label", f"key {key!r} is empty")
    if len(label) > MAX_LABEL:
        return Bad("long_label", f"key {key!r} has {len(label)} characters; a label has at most {MAX_LABEL}")
    return _checked(text, label)


def _is_infinite(value: Any) -> bool:
    """Whether it is NaN or an infinity: what `NaN` in JSON, 1e400 and an empty cell of a float column come out as."""
    return isinstance(value, float) and not math.isfinite(value)


@lru_cache(maxsize=4096)
def _one_line(label: str) -> str:
    return " ".join(label.split())


def _checked(text: str, label: str | None) -> Example | Bad:
    try:
        text.isascii() or text.encode()
        (label or "").encode()
    except UnicodeEncodeError:
        return Bad("encoding", "holds half of a surrogate pair, which is no character")
    return Example(text, label)


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        dict: "object",
        list: "list",
        str: "text",
        bool: "boolean",
        int: "number",
        float: "number",
    }
    return names.get(type(value), type(value).__name__)
