"""Attention that gives a row the same bits whatever the number of rows."""

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

_QUERY_KEY_VALUE, _LENGTHS, _POSITIONS = (0, 1, 2), (5, 6), 9


def with_spare_row(graph: onnx.GraphProto) -> None:
    """Make each GroupQueryAttention of `graph` compute one row more, which nothing reads.

    ONNX Runtime multiplies a single row by another kernel than several, whose sums have other bits.
    Products with quantized weights round their input to 8 bits, which makes of a different bit a
    difference of 1 %, and of that another token. The spare row lies behind the others: they do not
    see it, and the next pass overwrites its key and value. The caches need room for it.
    """
    for node in list(graph.node):
        if node.op_type == "GroupQueryAttention":
            _extend(graph, node)


def _extend(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    name = node.output[0]
    before = [
        *_padded(graph, node, (p for p in _QUERY_KEY_VALUE if node.input[p]), [0, 0, 0, 0, 1, 0]),
        *_padded(graph, node, range(_POSITIONS, _POSITIONS + 1), [0, 0, 0, 1]),
        *_one_more(graph, node),
    ]
    node.output[0] = f"{name}_with_spare"
    _constant(graph, f"{name}_cut", [0, 0, 0, 0, -1, 0])
    after = helper.make_node("Pad", [node.output[0], f"{name}_cut"], [name])
    position = list(graph.node).index(node)
    for offset, new in enumerate(before):
        graph.node.insert(position + offset, new)
    graph.node.insert(position + len(before) + 1, after)


def _padded(
    graph: onnx.GraphProto, node: onnx.NodeProto, positions: Iterator[int] | range, pads: list[int]
) -> Iterator[onnx.NodeProto]:
    """Nodes that pad inputs of `node`, which takes theirs instead."""
    for position in positions:
        if position >= len(node.input) or not node.input[position]:
            continue
        value = f"{node.output[0]}_padded_{position}"
        _constant(graph, f"{value}_pads", pads)
        yield helper.make_node("Pad", [node.input[position], f"{value}_pads"], [value])
        node.input[position] = value


def _one_more(graph: onnx.GraphProto, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Nodes that add one to the lengths that `node` takes."""
    one = f"{node.output[0]}_one"
    graph.initializer.append(helper.make_tensor(one, TensorProto.INT32, [], [1]))
    for position in _LENGTHS:
        value = f"{node.output[0]}_length_{position}"
        yield helper.make_node("Add", [node.input[position], one], [value])
        node.input[position] = value


def _constant(graph: onnx.GraphProto, name: str, values: list[int]) -> None:
    tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
    graph.initializer.append(tensor)
