"""Ask a model folder: labels of texts or pictures, completions of a language model, raw logits.

The served weights are model.onnx, run by ONNX Runtime, or else model.safetensors, run by torch. Nothing in the folder
is executed or unpickled, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from trainer.artifacts.dataset import Spec

ONNX, WEIGHTS, TOKENIZER = "model.onnx", "model.safetensors", "tokenizer.json"
# Inputs are padded to a multiple of this many tokens, as in training.
ROUND = 8


def served_file(folder: str | Path) -> Path:
    """The file that is served: model.onnx if there is one, else model.safetensors.

    Raises:
        ArtifactError: neither is there.
    """
    for name in (ONNX, WEIGHTS):
        path = Path(folder) / name
        if path.is_file():
            return path
    raise ArtifactError(f"{folder}: holds neither {ONNX} nor {WEIGHTS}", "pass a model folder, such as out/quantized")


def served_bytes(folder: str | Path) -> int:
    """Bytes of the served weights file."""
    return served_file(folder).stat().st_size


class Predictor:
    """A model folder that is ready to answer.

    Attributes:
        spec: the shape of the examples.
        labels: names of the labels, by number; empty for a language model.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        """Open a model folder; `threads` 0 takes what the runtime chooses.

        Raises:
            ArtifactError: the folder holds no model, or it cannot be read.
        """
        from trainer.models import read_config

        self.folder = Path(folder)
        self.file = served_file(self.folder)
        _, self.spec, self.labels = read_config(self.folder)
        self._run: Callable[[np.ndarray], np.ndarray] = (
            self._open_onnx(threads) if self.file.name == ONNX else self._open_torch(threads)
        )
        self._tokenizer: Any = None

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Raw outputs, float32: (rows, labels), or (rows, length, vocabulary) of a language model.

        Args:
            inputs: int64 tokens (rows, length) padded with 0 at the end, or float32 pictures (rows, channels, size, size)
                in 0..1.
        """
        if self.spec.task == "image":
            return self._run(np.ascontiguousarray(inputs, np.float32))
        inputs = np.asarray(inputs, np.int64)
        length = inputs.shape[1]
        if length < ROUND:
            inputs = np.pad(inputs, ((0, 0), (0, ROUND - length)))
        found = self._run(np.ascontiguousarray(inputs))
        return found[:, :length] if self.spec.task == "lm" else found

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as int64 tokens (rows, longest), cut off at `spec.max_length` and padded with 0 at the end."""
        encoded = self.tokenizer.encode_batch([str(text) for text in texts], add_special_tokens=False)
        rows = [each.ids[: self.spec.max_length] for each in encoded]
        longest = max((len(row) for row in rows), default=1)
        width = max(1, min(-(-longest // ROUND) * ROUND, self.spec.max_length))
        tokens = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return tokens

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ArtifactError: it is missing or not readable.
        """
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            path = self.folder / TOKENIZER
            try:
                self._tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises plain Exception
                raise ArtifactError(f"{path}: not a tokenizer: {error}", "run the stage that makes the model") from None
        return self._tokenizer

    def predict(
        self,
        inputs: Sequence[str],
        batch_size: int = 64,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Answers, one for each input.

        Args:
            inputs: texts, or paths of pictures.
            batch_size: inputs in one pass through the model.
            max_new_tokens: language models: longest completion.
            temperature: language models: 0 takes the likeliest token, above it samples.
            seed: language models: seed of the sampling.

        Returns:
            {"label", "score", "scores": {label: probability, the best first}}, or {"text", "completion"} of a language model.
        """
        if self.spec.task == "lm":
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            return [{"text": text, "completion": self.complete(text, **options)} for text in inputs]  # type: ignore[arg-type]
        answers: list[dict[str, Any]] = []
        for start in range(0, len(inputs), batch_size):
            part = inputs[start : start + batch_size]
            arrays = load_pictures(part, self.spec) if self.spec.task == "image" else self.encode(part)
            for row in softmax(self.logits(arrays)):
                best = int(row.argmax())
                scores = {self.labels[index]: round(float(row[index]), 6) for index in np.argsort(-row, kind="stable")}
                answers.append({"label": self.labels[best], "score": round(float(row[best]), 6), "scores": scores})
        return answers

    def complete(self, text: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Continue a text until its end, `max_new_tokens` more tokens or forever; the model sees the last max_length tokens.

        An empty text starts a new document.
        """
        from trainer.artifacts.dataset import END, PAD

        rng = np.random.default_rng(seed)
        context = list(self.tokenizer.encode(text, add_special_tokens=False).ids) or [END]
        made: list[int] = []
        for _ in range(max_new_tokens):
            window = np.asarray([context[-self.spec.max_length :]], np.int64)
            last = self.logits(window)[0, -1].astype(np.float64)
            last[PAD] = -np.inf
            token = int(last.argmax())
            if temperature > 0:
                token = int(rng.choice(len(last), p=softmax(last[None] / temperature)[0]))
            if token == END:
                break
            context.append(token)
            made.append(token)
        return str(self.tokenizer.decode(made, skip_special_tokens=True))

    def _open_onnx(self, threads: int) -> Callable[[np.ndarray], np.ndarray]:
        from trainer.compress.export import INPUT, open_session

        try:
            session = open_session(self.file, threads)
        except Exception as error:  # onnxruntime's own classes, which derive from Exception
            reason = str(error).splitlines()[0][:200]
            raise ArtifactError(
                f"{self.file}: not readable as ONNX: {reason}", "run the stage quantize again"
            ) from None

        def run(inputs: np.ndarray) -> np.ndarray:
            return np.asarray(session.run(None, {INPUT: inputs})[0], np.float32)

        return run

    def _open_torch(self, threads: int) -> Callable[[np.ndarray], np.ndarray]:
        import torch

        from trainer.models import load

        model = load(self.folder).model
        if threads:
            torch.set_num_threads(threads)

        def run(inputs: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return np.asarray(model(torch.from_numpy(inputs)).float().numpy())

        return run


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, float64."""
    wide = np.asarray(logits, np.float64)
    shifted = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def load_pictures(paths: Sequence[str], spec: Spec) -> np.ndarray:
    """Pictures as float32 (rows, channels, size, size) in 0..1, scaled as preprocess scales them.

    Raises:
        DataError: a file is missing or not a picture.
    """
    from trainer.data.pictures import decode

    shape = (spec.image_channels, spec.image_size, spec.image_size)
    rows = []
    for path in map(Path, paths):
        picture = decode(path.name, path.parent, spec.image_size, spec.image_channels)
        if not isinstance(picture, bytes):
            raise DataError(f"{path}: not a picture that can be read: it {picture.message}", "give PNG or JPEG files")
        rows.append(np.frombuffer(picture, np.uint8).reshape(shape).astype(np.float32) / 255.0)
    return np.stack(rows) if rows else np.zeros((0, *shape), np.float32)
