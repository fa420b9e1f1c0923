"""Plain values: what YAML, JSON, DVC and Kubeflow agree on, and so all that a parameter can be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from trainer.config.names import shown
from trainer.errors import ConfigError

MAX_DEPTH = 12
MAX_INT = 2**63 - 1


def plain(value: Any, *path: Any) -> Any:
    """A deep copy that JSON can hold; whole floats become integers, which float parameters accept as well.

    Args:
        value: of a parameter, a section or a whole configuration.
        path: its keys from the top, for errors.

    Raises:
        ConfigError: a key is no text, or a value is no finite number of 64 bits, text, truth value, list or mapping.
    """
    if len(path) > MAX_DEPTH:
        raise _error(path, "nested too deeply", "sections nest at most three levels")
    if isinstance(value, (dict, Mapping)):
        for key in value:
            if not isinstance(key, str) or not _is_text(key):
                raise _error((*path, key), "a key must be text", "see `millrace config` for the keys")
        return {key: plain(item, *path, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, *path, i) for i, item in enumerate(value)]
    return _scalar(value, path)


def _error(path: tuple[Any, ...], message: str, hint: str) -> ConfigError:
    return ConfigError(f"{'.'.join(map(shown, path)) or 'value'}: {message}", hint)


def _scalar(value: Any, path: tuple[Any, ...]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not _is_text(value):
            raise _error(path, "holds characters that are no text", "write it without escapes such as \\0")
        return value
    if isinstance(value, (int, Integral)):
        if abs(int(value)) > MAX_INT:
            raise _error(path, "must be a number of at most 64 bits", "write a smaller number")
        return int(value)
    if isinstance(value, (float, Real)):
        number = float(value)
        if not math.isfinite(number):
            raise _error(path, f"must be a finite number (given {number})", "write a finite number")
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    raise _error(path, f"a {type(value).__name__} is no value of a parameter", "write a number or a text")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
