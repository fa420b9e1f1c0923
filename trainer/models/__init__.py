"""Model families, one file each: plain `nn.Module`s that know nothing of training.

`build` makes a model from its parameters, `save` and `load` keep it as a folder in Hugging Face's layout. A model file
has one function `build(config, spec) -> nn.Module`; `trainer.config.model.FAMILIES` is the registry.

Shapes: text classifiers map tokens int64 (batch, length), 0 = padding at the end, to logits (batch, labels); language
models map the same tokens to logits (batch, length, vocabulary); image models map float32 (batch, channels, height,
width) in 0..1 to logits (batch, labels). A classifier's last layer is an `nn.Linear` called `output`: its probabilities
are calibrated there.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import storage
from trainer.artifacts.dataset import Spec
from trainer.config.model import FAMILIES, Family
from trainer.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER, METRICS = "config.json", "model.safetensors", "tokenizer.json", "metrics.json"


@dataclass(frozen=True)
class Loaded:
    """A model read from its folder: in evaluation mode, on the CPU."""

    model: nn.Module
    config: Family
    spec: Spec
    labels: list[str]


def build(config: Family, spec: Spec) -> nn.Module:
    """A freshly initialised model; the initialisation follows torch's global generator.

    Args:
        config: the family and its parameters.
        spec: the shape of the examples.

    Raises:
        ConfigError: the parameters do not fit the data, such as a patch that does not divide the picture.
    """
    module: nn.Module = importlib.import_module(FAMILIES[config.name][1]).build(config, spec)
    return module


def num_parameters(model: nn.Module) -> int:
    """Number of trainable parameters; one that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save(
    folder: Path,
    model: nn.Module,
    config: Family,
    spec: Spec,
    labels: list[str],
    tokenizer: Path | None,
    metrics: dict[str, float],
) -> None:
    """Write config.json, model.safetensors, tokenizer.json and metrics.json into `folder`, making it if needed.

    Args:
        folder: where to write.
        model: the weights to keep.
        config: the family it was built from.
        spec: the shape of the examples it was built for.
        labels: names of the labels, by number; empty for a language model.
        tokenizer: the tokenizer.json to copy; None for pictures.
        metrics: scalar figures of the model, such as val_accuracy.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "architectures": [type(model).__name__],
        "model_type": f"millrace-{config.name}",
        "task": spec.task,
        "model": config.model_dump(mode="json"),
        "spec": asdict(spec),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_parameters": num_parameters(model),
    }
    storage.write_json(folder / CONFIG, content)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, str(folder / WEIGHTS), metadata={"format": "pt"})
    except SafetensorError as error:
        # It keeps the system's error number in its text alone: "I/O error: No space left on device (os error 28)".
        found = re.search(r"os error (\d+)", str(error))
        if not found:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder / WEIGHTS)) from error
    # safetensors makes its file for this user alone; pods that share a volume may run as others.
    (folder / WEIGHTS).chmod(0o644)
    if tokenizer is not None and tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    storage.write_json(folder / METRICS, metrics)


def load(folder: str | Path) -> Loaded:
    """Read a model folder. Nothing in it is executed or unpickled.

    Raises:
        ArtifactError: a file is missing, is not what it should be, or the weights do not fit the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config, spec, labels = read_config(folder)
    rebuild = "run the stage that makes the model again"
    model = build(config, spec)
    try:
        weights = load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS}: not readable as safetensors: {error}", rebuild) from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ArtifactError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}", rebuild) from None
    return Loaded(model.eval(), config, spec, labels)


def read_config(folder: Path) -> tuple[Family, Spec, list[str]]:
    """The family, spec and labels that a model folder's config.json names. Imports no torch.

    Raises:
        ArtifactError: it is missing or not ours.
    """
    path = folder / CONFIG
    rebuild = "run the stage that makes the model again"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ArtifactError(f"{path}: format {content['format']!r}, this version reads {FORMAT}", rebuild)
        family = FAMILIES[content["model"]["name"]][0]
        config = family.model_validate(content["model"])
        spec = Spec(**content["spec"])
        labels = [content["id2label"][str(i)] for i in range(len(content["id2label"]))]
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", "pass a model folder") from None
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a model's configuration: {error}", rebuild) from None
    return config, spec, labels
