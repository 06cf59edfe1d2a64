"""Tensors whose values a graph holds."""

from typing import Any

import numpy.typing as npt
import onnx
from onnx import numpy_helper


def constants(graph: onnx.GraphProto) -> dict[str, npt.NDArray[Any]]:
    """By name: what Constant nodes give, and initializers that are not in other files."""
    values = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    return values | {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.raw_data}
