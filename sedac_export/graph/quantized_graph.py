"""Replace a graph's products and look-ups by operators that read quantized weights."""

from collections.abc import Iterator, Mapping
from enum import Enum

import onnx
from onnx import TensorProto, helper

from sedac_export.graph.trace import TracedGraph
from sedac_export.model.quantization import Quantization

# beside the initialiser that holds a quantized weight's values, those of its scales and zero points
SCALES, ZERO_POINTS = ".scales", ".zero_points"

# activations are rounded to 8 bits: the fastest on CPUs (docs/measurements.md), and the only level
# at which a row has the same bits whatever the number of rows
ACCURACY_LEVEL = 4


class Layout(Enum):
    """Which axis of a stored weight counts a product's outputs: the rows of what is quantized."""

    ROWS = 0
    COLUMNS = 1

    def transposed(self) -> "Layout":
        """That of the transposed weight."""
        return Layout(1 - self.value)


def layouts(graph: TracedGraph) -> dict[str, Layout | None]:
    """By weight of `graph`, how it lies, or None where it cannot be quantized.

    Weights that are multiplied with and embeddings of tokens can be.
    """
    uses = _Uses(graph.model.graph)
    return {initializer: uses.layout(initializer) for initializer in graph.weights}


def product_inputs(graph: TracedGraph) -> dict[str, str]:
    """By weight that `graph` multiplies with, the name of what it is multiplied with."""
    uses = _Uses(graph.model.graph)
    products = [node for node in graph.model.graph.node if node.op_type in ("MatMul", "Gemm")]
    read = {uses.operand(node.input[1]): node.input[0] for node in products}
    return {weight: x for weight, x in read.items() if weight in graph.weights}


def quantized_graph(
    graph: TracedGraph, chosen: Mapping[str, Layout], quantization: Quantization
) -> TracedGraph:
    """`graph` with the `chosen` of its weights quantized.

    The weights of the result have those of their scales and zero points beside them: the same names
    with `SCALES` and `ZERO_POINTS` added.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    uses, weights = _Uses(model.graph), dict(graph.weights)
    parts = {
        initializer.name: _Parts(initializer, chosen[initializer.name], quantization)
        for initializer in model.graph.initializer
        if initializer.name in chosen
    }
    for name, stored in parts.items():
        added = stored.declare(model.graph, gathered=uses.is_embedding(name))
        weights |= dict.fromkeys(added, weights[name])
    for node in list(model.graph.node):
        if node.op_type == "Gather" and node.input[0] in parts:
            _put(model.graph, node, parts[node.input[0]].embedding(node))
        elif node.op_type in ("MatMul", "Gemm"):
            operand = uses.operand(node.input[1])
            if operand in parts:
                _put(model.graph, node, parts[operand].product(node))
    _drop_unread(model.graph)
    if all(opset.domain != "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return TracedGraph(model, weights)


def weight_of_part(initializer: str) -> tuple[str, str]:
    """The quantized weight that `initializer` is a part of, and the part's suffix."""
    for suffix in (SCALES, ZERO_POINTS):
        if initializer.endswith(suffix):
            return initializer.removesuffix(suffix), suffix
    return initializer, ""


class _Parts:
    """What is stored of one quantized weight."""

    def __init__(self, weight: TensorProto, layout: Layout, quantization: Quantization) -> None:
        self.weight, self.quantization = weight, quantization
        self.rows = weight.dims[layout.value]
        self.columns = weight.dims[1 - layout.value]
        added = (SCALES,) if quantization.symmetric else (SCALES, ZERO_POINTS)
        self.names = [weight.name, *(f"{weight.name}{suffix}" for suffix in added)]

    def declare(self, graph: onnx.GraphProto, gathered: bool) -> list[str]:
        """Make the weight's initialiser that of its values, and add the others; their names."""
        quantization, blocks = self.quantization, self.quantization.blocks(self.columns)
        width = quantization.bytes_of(quantization.block_size)
        self.weight.data_type = TensorProto.UINT8
        self.weight.dims[:] = (
            [self.rows, blocks * width] if gathered else [self.rows, blocks, width]
        )
        shapes = {
            SCALES: (TensorProto.FLOAT, blocks),
            ZERO_POINTS: (TensorProto.UINT8, quantization.bytes_of(blocks)),
        }
        for name in self.names[1:]:
            kind, count = shapes[weight_of_part(name)[1]]
            graph.initializer.add(name=name, data_type=kind, dims=[self.rows, count])
        return self.names[1:]

    def product(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """`node`, a product with the weight, from its parts."""
        inputs = [node.input[0], *self.names]
        if len(node.input) > 2:  # after the zero points and an order of columns comes the bias
            inputs += [""] * (5 - len(inputs)) + [node.input[2]]
        return helper.make_node(
            "MatMulNBits",
            inputs,
            node.output,
            domain="com.microsoft",
            K=self.columns,
            N=self.rows,
            bits=self.quantization.bits,
            block_size=self.quantization.block_size,
            accuracy_level=ACCURACY_LEVEL,
        )

    def embedding(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """`node`, which gathers rows of the weight, from its parts."""
        values, *others = self.names
        return helper.make_node(
            "GatherBlockQuantized",
            [values, node.input[1], *others],
            node.output,
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            bits=self.quantization.bits,
            block_size=self.quantization.block_size,
        )


class _Uses:
    """What the nodes of a graph make of its weights."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.ranks = {item.name: len(item.dims) for item in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def layout(self, weight: str) -> Layout | None:
        """How `weight` lies, None where one of its uses is no product and no embedding."""
        if self.ranks[weight] != 2:
            return None
        found = set(self._layouts(weight, Layout.COLUMNS))
        return found.pop() if len(found) == 1 else None

    def is_embedding(self, weight: str) -> bool:
        """Whether rows of `weight` are gathered."""
        return any(node.op_type == "Gather" for node in self.readers.get(weight, ()))

    def operand(self, matrix: str) -> str | None:
        """The initialiser that `matrix` is, transposed or not; None where it is something else."""
        if matrix in self.ranks:
            return matrix
        node = self.producers.get(matrix)
        return self.operand(node.input[0]) if node and node.op_type == "Transpose" else None

    def _layouts(self, value: str, layout: Layout) -> Iterator[Layout | None]:
        """How a weight lies by each use of `value`, the weight itself or what is made of it."""
        for node in self.readers.get(value, ()):
            attributes = _attributes(node)
            match node.op_type:
                case "Transpose":
                    yield from self._layouts(node.output[0], layout.transposed())
                case "MatMul" if list(node.input).index(value) == 1:
                    yield layout
                case "Gemm" if self._is_product(node, value):
                    yield layout.transposed() if attributes.get("transB") else layout
                case "Gather" if self._tokens(node.input[1]) and not attributes.get("axis"):
                    yield layout.transposed()
                case _:
                    yield None

    def _tokens(self, value: str) -> bool:
        """Whether `value` holds the token ids, in some shape."""
        node = self.producers.get(value)
        if node is not None and node.op_type == "Reshape":
            return self._tokens(node.input[0])
        return value == "input_ids"

    def _is_product(self, node: onnx.NodeProto, matrix: str) -> bool:
        """Whether a Gemm is x times `matrix`, and a vector for bias if any."""
        attributes = _attributes(node)
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        vector = len(node.input) < 3 or self.ranks.get(node.input[2]) == 1
        return node.input[1] == matrix and plain and vector and not attributes.get("transA")


def _put(graph: onnx.GraphProto, old: onnx.NodeProto, new: onnx.NodeProto) -> None:
    """Replace the node `old` of `graph`."""
    graph.node[list(graph.node).index(old)].CopyFrom(new)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop the nodes that transposed weights for products that are replaced."""
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.output[0] not in read:
            graph.node.remove(node)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
