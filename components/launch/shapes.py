"""Whether an object has only the fields that its kind has, each of the right type: by the models that the projects publish.

They take 70 MB and a second to import, so a launcher does this in a child process (validate.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Problem = tuple[str, str]
"""(dotted path, what is wrong)"""

# apiVersion/kind -> the module of its models, and its class there.
_MODELS = {
    "kubeflow.org/v1/PyTorchJob": ("kubeflow.training.models", "KubeflowOrgV1PyTorchJob"),
    "batch/v1/Job": ("kubernetes.client.models", "V1Job"),
    "kubeflow.org/v1beta1/Experiment": ("kubeflow_katib_api.models", "V1beta1Experiment"),
    "trainer.kubeflow.org/v1alpha1/TrainJob": ("kubeflow_trainer_api.models", "TrainerV1alpha1TrainJob"),
    "trainer.kubeflow.org/v1alpha1/TrainingRuntime": ("kubeflow_trainer_api.models", "TrainerV1alpha1TrainingRuntime"),
}
_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "datetime": (str,),
}


def kind_of(obj: dict[str, Any]) -> str:
    """`kubeflow.org/v1/PyTorchJob`."""
    return f"{obj.get('apiVersion')}/{obj.get('kind')}"


def unlike(obj: dict[str, Any]) -> list[Problem]:
    """Fields that the object's kind does not have, and values of another type than it takes.

    Raises:
        ImportError: the models are not installed (the extra `launcher`).
    """
    import importlib

    kind = kind_of(obj)
    if kind not in _MODELS:
        return [("kind", f"{kind} is none of {', '.join(_MODELS)}")]
    module, name = _MODELS[kind]
    model = getattr(importlib.import_module(module), name)
    if hasattr(model, "openapi_types"):
        return list(_by_table(obj, model, ""))
    found = list(_by_pydantic(obj, model))
    trial = (
        ((obj.get("spec") or {}).get("trialTemplate") or {}).get("trialSpec") if name == "V1beta1Experiment" else None
    )
    if isinstance(trial, dict):
        found += [(f"spec.trialTemplate.trialSpec.{path}", message) for path, message in unlike(trial)]
    return found


def _by_table(value: Any, model: Any, path: str) -> Iterator[Problem]:
    """Models of the older generator: a table of types."""
    if not isinstance(value, dict):
        yield path, f"must be an object (given {value!r})"
        return
    fields = {json: (name, model.openapi_types[name]) for name, json in model.attribute_map.items()}
    for key, item in value.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in fields:
            yield where, "unknown field"
        else:
            yield from _typed(item, fields[key][1], where)


def _typed(value: Any, kind: str, path: str) -> Iterator[Problem]:
    """Whether a value is of a type as the older generator writes it: `int`, `list[V1Container]`, `dict(str, str)`."""
    if value is None or kind == "object":
        return
    inner = re.fullmatch(r"(?:list\[(.*)\]|dict\(str, (.*)\))", kind)
    if inner is None and kind in _SCALARS:
        if not isinstance(value, _SCALARS[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield path, f"must be {kind} (given {value!r})"
        return
    if inner is None:
        model = _model(kind)
        if model is not None and hasattr(model, "openapi_types"):
            yield from _by_table(value, model, path)
        return
    wanted: Any = list if inner[1] else dict
    if not isinstance(value, wanted):
        yield path, f"must be a {wanted.__name__} (given {value!r})"
        return
    for key, item in value.items() if inner[2] else enumerate(value):
        yield from _typed(item, inner[1] or inner[2], f"{path}.{key}")


def _model(name: str) -> Any:
    from kubeflow.training import models as training
    from kubernetes.client import models as core

    return getattr(training, name, None) or getattr(core, name, None)


def _by_pydantic(obj: dict[str, Any], model: Any) -> Iterator[Problem]:
    """Models of the newer generator: what they do not know is gone after a round trip."""
    from pydantic import ValidationError

    try:
        read = model.from_dict(obj)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            where = ".".join(str(part) for part in each["loc"])
            yield where, f"{each['msg']} (given {each.get('input')!r})"
        return
    yield from _lost(obj, read.to_dict(), "")


def _lost(given: Any, kept: Any, path: str) -> Iterator[Problem]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            where = f"{path}.{key}".lstrip(".")
            if key in kept:
                yield from _lost(value, kept[key], where)
            elif value is not None:
                yield where, "unknown field"
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=False)):
            yield from _lost(one, other, f"{path}.{index}")
