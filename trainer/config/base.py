"""What all parameter sections share: closed, frozen, finite, and described by the docstring under each field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


def no_bool(value: Any) -> Any:
    """For literal integers: pydantic takes `true` for 1 there even when types are strict."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number (given {value})")
    return value


class Section(BaseModel):
    """A section of params.yaml. Unknown keys are errors, values cannot be changed after loading, NaN is refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
