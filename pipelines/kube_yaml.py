"""Kubernetes objects as YAML for people and for kubectl, whose parser takes more texts for numbers than Python's does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Lists of plain values in one line, texts of several lines as blocks; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    # To kubectl, 71e59324 is a number and y is true, which no label or annotation may be.
    if (text[:1] in tuple("+-.0123456789") and not text.startswith("--")) or text in ("y", "Y", "n", "N"):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = all(isinstance(each, str | int) for each in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def documents(objects: Sequence[Mapping[str, Any]]) -> str:
    """The objects as documents of one text, fields in the order in which they were rendered."""
    texts = [yaml.dump(dict(obj), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for obj in objects]
    return "---\n".join(texts)
