"""Presets: complete, commented configurations in trainer/presets/*.yaml, each with real data it works on.

Those that ask for GPUs (`cluster.gpus_per_node`) are sizes for a cluster: `millrace plan --preset NAME` says what they take.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from trainer import storage
from trainer.config.load import validate
from trainer.config.names import nearest
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError

DEFAULT = "text-classify"


def names() -> list[str]:
    """Names of the presets, the default first."""
    found = sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def text(name: str) -> str:
    """A preset as it is written to params.yaml.

    Raises:
        ConfigError: no preset has this name.
    """
    if name not in names():
        raise ConfigError(f"preset {name!r}: no such preset; {nearest(name, names())}", "see `millrace preset ls`")
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first comment line of a preset, which says what it is."""
    return text(name).splitlines()[0].lstrip("# ")


def needs_gpus(name: str) -> bool:
    """Whether a preset is for a cluster: its model is too large to be trained on a laptop."""
    return validate(parse_yaml(text(name), name), f"preset {name}").cluster.gpus_per_node > 0


def use(name: str, path: Path) -> None:
    """Write a preset to a params.yaml."""
    content = text(name)
    validate(parse_yaml(content, name), f"preset {name}")
    storage.write_atomic(path, content.encode())


def _folder() -> resources.abc.Traversable:
    return resources.files("trainer") / "presets"
