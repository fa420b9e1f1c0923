"""ONNX graphs in the form that ONNX Runtime can quantise: products with constant matrices as plain MatMul nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def unfold(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with Gemm of a constant matrix as MatMul and Add, and with the transposes of constants computed."""
    import onnx
    from onnx import helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = _Constants(graph)
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Transpose" and constants.is_matrix(node.input[0]):
            renamed[node.output[0]] = constants.transposed(node.input[0], list(given.get("perm", [1, 0])))
            continue
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        if node.op_type == "MatMul" and constants.is_matrix(node.input[1]):
            node.input[1] = constants.tied(node.input[1])
        nodes += _from_gemm(node, given, constants) if node.op_type == "Gemm" else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return result


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads."""
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


class _Constants:
    """The initializers of a graph, and their transposes, which are added to it as they are asked for."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        self.looked_up = [
            node.input[0] for node in graph.node if node.op_type == "Gather" and self.is_matrix(node.input[0])
        ]

    def is_matrix(self, name: str) -> bool:
        return name in self.tensors and len(self.tensors[name].dims) == 2

    def array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[name])

    def transposed(self, name: str, order: list[int]) -> str:
        """The name of a matrix with its axes in another order."""
        from onnx import numpy_helper

        if order == [0, 1]:
            return name
        new = f"{name}_t"
        if new not in self.tensors:
            self.tensors[new] = numpy_helper.from_array(np.ascontiguousarray(self.array(name).T), new)
            self.graph.initializer.append(self.tensors[new])
        return new

    def tied(self, name: str) -> str:
        """`TABLE_t` if a matrix is the transpose of a table that is looked up: the exporter may have computed it."""
        for table in self.looked_up:
            if list(self.tensors[table].dims) != list(self.tensors[name].dims)[::-1]:
                continue
            if np.array_equal(self.array(table).T, self.array(name)):
                return self.transposed(table, [1, 0])
        return name


def _from_gemm(node: onnx.NodeProto, given: dict[str, Any], constants: _Constants) -> list[onnx.NodeProto]:
    """A Gemm with a constant matrix as MatMul and Add; another one as it is."""
    from onnx import helper

    plain = given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    if not plain or not constants.is_matrix(node.input[1]):
        return [node]
    matrix = constants.transposed(node.input[1], [1, 0]) if given.get("transB", 0) else node.input[1]
    out = node.output[0]
    if len(node.input) < 3 or not node.input[2]:
        return [helper.make_node("MatMul", [node.input[0], matrix], [out])]
    return [
        helper.make_node("MatMul", [node.input[0], matrix], [f"{out}_product"]),
        helper.make_node("Add", [f"{out}_product", node.input[2]], [out]),
    ]
