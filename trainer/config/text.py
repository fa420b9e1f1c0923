"""Configuration as text: YAML 1.2 scalars, as DVC reads them, without aliases, tags and duplicate keys.

PyYAML alone follows YAML 1.1, where `1e-3` is text, `no` is false, `010` is eight and `1:30` is ninety.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Reads plain mappings, lists and scalars; a kilobyte of aliases could expand to gigabytes, so they are refused."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out, or quote it")
        if getattr(event, "tag", None):
            raise yaml.YAMLError(f"tags ({event.tag}) are not supported; write the plain value, or quote it")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is a list or mapping, line {key.start_mark.line + 1}")
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value[:100]!r} appears twice, line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)


_NUMBER = r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
_SCALARS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", rf"^(?:{_NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+0123456789."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
)
_Loader.yaml_implicit_resolvers = {"": [("tag:yaml.org,2002:null", re.compile("^$"))]}
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or 1.2 would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text safely; `where` names it in errors.

    Raises:
        ConfigError: it is not YAML, too large, or uses aliases, tags or duplicate keys.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES} characters", "a configuration is a few kilobytes")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply", "sections nest at most three levels") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{where}: not valid YAML: {reason}", "check indentation, colons and quotes") from None


def parse_value(text: str, where: str) -> Any:
    """The value of an override: `[...]`, `{...}` and quoted text are YAML, all else is one scalar, taken as it is.

    So `*.csv`, `#1`, `a: b` and `@x` are text; nothing at all is the empty text, as for Hydra and DVC.

    Raises:
        ConfigError: a list, mapping or quoted text is not valid.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text, where)
    if not text or not text.isprintable():
        return text
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:
        message = f"{where}: must be a number of at most 64 bits"
        raise ConfigError(message, "write a smaller number") from error
    finally:
        loader.dispose()


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it is missing, not readable, too large or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "write one with `millrace preset use text-classify`") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: {reason}", "check the path and its permissions") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes", "a configuration is a few kilobytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None


def dump_yaml(tree: Any) -> str:
    """Plain values as YAML that `parse_yaml`, DVC and Hydra read back to the same values."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
