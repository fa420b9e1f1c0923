"""ONNX export: any model of ours as one self-contained file, the same bytes for the same weights.

Everything that the exporter adds beside the computation (source paths, stack traces, node names, shapes) is stripped.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.artifacts.dataset import Spec

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    from torch import nn

INPUT, OUTPUT = "inputs", "logits"
# The narrowest text that a model is given: batches are padded to a multiple of 8 in training as well.
MIN_LENGTH = 8


def export_onnx(model: nn.Module, spec: Spec) -> onnx.ModelProto:
    """The model as ONNX with one input `inputs` and one output `logits`, dynamic in batch and length.

    Args:
        model: in whatever mode; exported in evaluation mode, on the CPU, in float32.
        spec: the shape of its examples.
    """
    import torch
    from torch.export import Dim

    model = model.eval()
    if spec.task == "image":
        example = torch.zeros(2, spec.image_channels, spec.image_size, spec.image_size)
        shapes: tuple[dict[int, Any]] = ({0: Dim("batch", min=1)},)
    else:
        # Neither 1 nor a size that occurs in the model, so that the exporter takes no dimension for a constant.
        example = torch.ones(2, min(3 * MIN_LENGTH, spec.max_length), dtype=torch.int64)
        shapes = ({0: Dim("batch", min=1), 1: Dim("length", min=MIN_LENGTH, max=max(spec.max_length, 2 * MIN_LENGTH))},)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return clean(program.model_proto)


def clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Strip what is not computation, in place: names of nodes, shapes within, doc strings and metadata."""
    from trainer import __version__

    model.producer_name, model.producer_version = "millrace", __version__
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "model", ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    for index, node in enumerate(graph.node):
        node.name, node.doc_string = f"{node.op_type}_{index}", ""
        del node.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    return model


def serialise(model: onnx.ModelProto) -> bytes:
    """The bytes of the file."""
    return bytes(model.SerializeToString(deterministic=True))


def open_session(model: bytes | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that says nothing; `trainer/__init__.py` has switched its telemetry off.

    Args:
        model: the file or its bytes.
        threads: threads of one operator; 0 takes one per core.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings, log lines and prints of exporters and quantisers; errors still pass as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(_Swallow(sys.stderr)),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Swallow(io.StringIO):
    """Takes what is written to stderr; libraries that ask for its file descriptor still get one."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def fileno(self) -> int:
        """The descriptor of the stream that stands behind it."""
        return int(self._stream.fileno())
