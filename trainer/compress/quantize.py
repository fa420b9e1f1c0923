"""int8 quantisation: ONNX Runtime dynamic and static, and torchao; embedding tables with one scale per row.

ONNX Runtime takes the matrix products and convolutions. Tables it would quantise with one scale for all rows; here the
Gather of a float table becomes a Gather of its int8 rows times a Gather of the rows' scales: a quarter of the bytes,
and an error per row of at most 1/254 of the row's largest value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.compress.export import INPUT, clean, quiet
from trainer.compress.unfold import drop_unused, unfold

if TYPE_CHECKING:
    import onnx
    from torch import nn

# Tables below this number of values are left alone: their bytes do not matter and their rounding could.
MIN_TABLE = 4096


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale per row: int8 (rows, width) and float16 (rows, 1), table ~ int8 x scale.

    A row that is all zeros, such as that of the padding, stays exactly zero.
    """
    largest = np.abs(table).max(axis=1, keepdims=True)
    # Rounded up to the next float16, so that no value falls outside of -127..127.
    scales = np.nextafter((largest / 127.0).astype(np.float16), np.float16(np.inf))
    scales = np.where(largest > 0, scales, np.float16(0))
    wide = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    return np.clip(np.rint(table / wide), -127, 127).astype(np.int8), scales


def quantize_gathers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each Gather of a large float table along its rows is an int8 one with a scale per row."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    tables = {tensor.name: tensor for tensor in graph.initializer}
    quantised: set[str] = set()
    nodes = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
        if table is None or axis != 0 or len(table.dims) != 2 or table.data_type != TensorProto.FLOAT:
            nodes.append(node)
            continue
        if np.prod(table.dims) < MIN_TABLE:
            nodes.append(node)
            continue
        name = table.name
        shared = _from_output_layer(node, graph, tables)
        if shared:
            nodes += shared
            continue
        if name not in quantised:
            quantised.add(name)
            values, scales = quantize_rows(numpy_helper.to_array(table))
            graph.initializer.append(numpy_helper.from_array(values, f"{name}_int8"))
            graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
        out = node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [f"{out}_int8"], axis=0),
            helper.make_node("Gather", [f"{name}_scale", node.input[1]], [f"{out}_half"], axis=0),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], to=TensorProto.FLOAT),
            helper.make_node("Cast", [f"{out}_half"], [f"{out}_scale"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return result


def _from_output_layer(node: onnx.NodeProto, graph: onnx.GraphProto, tables: dict[str, Any]) -> list[onnx.NodeProto]:
    """The Gather of a table that is also the output layer (tied embeddings), reading the output layer's uint8 matrix.

    That matrix is (width, rows), with a scale and a zero point per row of the table; the table is not stored again.
    """
    from onnx import TensorProto, helper

    matrix, scale, zero = (f"{node.input[0]}_t_{part}" for part in ("quantized", "scale", "zero_point"))
    plain = [value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 2]
    if not {matrix, scale, zero} <= set(tables) or node.input[1] not in plain or len(tables[zero].dims) != 1:
        return []
    out, index = node.output[0], node.input[1]
    last = f"{out}_last"
    return [
        helper.make_node("Constant", [], [last], value_ints=[-1]),
        helper.make_node("Gather", [matrix, index], [f"{out}_columns"], axis=1),
        helper.make_node("Transpose", [f"{out}_columns"], [f"{out}_uint8"], perm=[1, 2, 0]),
        helper.make_node("Cast", [f"{out}_uint8"], [f"{out}_float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [zero, index], [f"{out}_zero_uint8"], axis=0),
        helper.make_node("Cast", [f"{out}_zero_uint8"], [f"{out}_zero_flat"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [f"{out}_zero_flat", last], [f"{out}_zero"]),
        helper.make_node("Gather", [scale, index], [f"{out}_scale_flat"], axis=0),
        helper.make_node("Unsqueeze", [f"{out}_scale_flat", last], [f"{out}_scale"]),
        helper.make_node("Sub", [f"{out}_float", f"{out}_zero"], [f"{out}_centred"]),
        helper.make_node("Mul", [f"{out}_centred", f"{out}_scale"], [out]),
    ]


def quantize_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """int8 weights, and activations that are quantised as they come; tables by row.

    Weights are unsigned: products of unsigned and signed bytes may saturate on processors without VNNI.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as ort_dynamic

    def run(source: str, target: str) -> None:
        ort_dynamic(
            source, target, op_types_to_quantize=["MatMul", "Conv"], per_channel=True, weight_type=QuantType.QUInt8
        )

    return quantize_gathers(_through_files(run, unfold(model)))


def quantize_static(model: onnx.ModelProto, batches: Iterable[np.ndarray]) -> onnx.ModelProto:
    """int8 weights, and activations with ranges fixed by calibration; tables by row.

    Args:
        model: a float model.
        batches: inputs of the train split to calibrate with.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as ort_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.rest, None)
            return None if batch is None else {INPUT: batch}

    def run(source: str, target: str) -> None:
        ort_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 7 bits: no saturation on processors without VNNI
        )

    return quantize_gathers(_through_files(run, model))


def quantize_torchao(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy with int8 linear layers (dynamic activations) and int8 tables, by torchao, and a note on what was left out."""
    import copy

    from torch import nn

    with quiet():
        import torch
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis

        result = copy.deepcopy(model).eval()
        quantize_(result, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda each, _: type(each) is nn.Linear)
        tables = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        quantize_(result, tables, filter_fn=lambda each, _: type(each) is nn.Embedding)
        _teach_torchao_embedding_bag()
    left = sorted(
        {type(each).__name__ for each in model.modules() if isinstance(each, nn.Conv1d | nn.Conv2d | nn.EmbeddingBag)}
    )
    return result, f"{', '.join(left)} stay float32" if left else ""


def _teach_torchao_embedding_bag() -> None:
    """Torchao 0.18 has a kernel for embedding but none for embedding_bag: do that on the float rows of the batch."""
    import torch
    from torch.nn.functional import embedding
    from torchao.quantization import IntxUnpackedToInt8Tensor

    aten = torch.ops.aten

    def bag(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        table, index, *rest = args
        rows, place = torch.unique(index, return_inverse=True)
        if len(rest) == 7 and rest[6] >= 0:  # padding_idx, as a number of the smaller table
            found = (rows == rest[6]).nonzero()
            rest[6] = int(found[0, 0]) if len(found) else -1
        return func(embedding(rows, table), place, *rest, **kwargs)

    IntxUnpackedToInt8Tensor.implements([aten._embedding_bag_forward_only.default, aten._embedding_bag.default])(bag)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; of a torchao tensor, those of its parts."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            return sum(size(getattr(tensor, name)) for name in names)
        return int(tensor.numel() * tensor.element_size())

    seen: dict[int, Any] = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(size(tensor) for tensor in seen.values())


def _through_files(run: Any, model: onnx.ModelProto) -> onnx.ModelProto:
    """Run a quantiser, which reads and writes files, and return what it wrote, cleaned."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="millrace-") as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, str(source))
        run(str(source), str(target))
        return clean(onnx.load(str(target)))
