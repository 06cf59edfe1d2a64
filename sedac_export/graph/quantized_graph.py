"""Replace a graph's products and look-ups by operators that read quantized weights."""

from collections.abc import Iterator, Mapping
from enum import Enum

import onnx
from onnx import TensorProto, helper

from sedac_export.graph.trace import TracedGraph
from sedac_export.model.quantization import Quantization

# beside the initialiser that holds a quantized weight's values, those of its scales and zero points
SCALES, ZERO_POINTS = ".scales", ".zero_points"

# int8 activations: measured to be the fastest on CPUs, and the only level at which a row has the
# same bits whatever the number of rows
ACCURACY_LEVEL = 4


class Layout(Enum):
    """Which axis of a stored weight counts a product's outputs: the rows of what is quantized."""

    ROWS = 0
    COLUMNS = 1


def layouts(graph: TracedGraph) -> dict[str, Layout | None]:
    """By weight of `graph`, how it lies, or None where it cannot be quantized.

    Weights that are multiplied with and embeddings of tokens can be.
    """
    uses = _Uses(graph.model.graph)
    return {initializer: uses.layout(initializer) for initializer in graph.weights}


def quantized_graph(
    graph: TracedGraph, chosen: Mapping[str, Layout], quantization: Quantization
) -> TracedGraph:
    """`graph` with the `chosen` of its weights quantized.

    The weights of the result have those of their scales and zero points beside them: the same names
    with `SCALES` and `ZERO_POINTS` added.
    """
    if not chosen:
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    uses = _Uses(model.graph)
    weights = dict(graph.weights)
    for initializer in list(model.graph.initializer):
        layout = chosen.get(initializer.name)
        if layout is not None:
            name, parts = initializer.name, _Parts(initializer, layout, quantization)
            uses.replace(name, parts)
            added = parts.declare(model.graph, gathered=uses.is_embedding(name))
            weights |= {part: weights[name] + part.removeprefix(name) for part in added}
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
        name = weight.name
        self.added = [f"{name}{SCALES}"]
        if not quantization.symmetric:
            self.added.append(f"{name}{ZERO_POINTS}")

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
        for name in self.added:
            kind, count = shapes[name.removeprefix(self.weight.name)]
            graph.initializer.add(name=name, data_type=kind, dims=[self.rows, count])
        return self.added

    def product(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """`node`, a product with the weight, from its parts."""
        inputs = [node.input[0], self.weight.name, *self.added]
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
        return helper.make_node(
            "GatherBlockQuantized",
            [self.weight.name, node.input[1], *self.added],
            node.output,
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            bits=self.quantization.bits,
            block_size=self.quantization.block_size,
        )


class _Uses:
    """The nodes of a graph by what they read."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.ranks = {item.name: len(item.dims) for item in graph.initializer}

    def layout(self, weight: str) -> Layout | None:
        """How `weight` lies, None where one of its uses is no product and no embedding."""
        found = {self._layout_of(weight, node) for node in self._readers(weight)}
        one = found.pop() if len(found) == 1 and self.ranks[weight] == 2 else None
        return one

    def is_embedding(self, weight: str) -> bool:
        """Whether rows of `weight` are gathered."""
        return any(node.op_type.startswith("Gather") for node in self._readers(weight))

    def replace(self, weight: str, parts: _Parts) -> None:
        """Put operators on `parts` in the place of each use of `weight`."""
        for node in list(self._readers(weight)):
            if node.op_type == "Gather":
                self._put(node, parts.embedding(node))
            elif node.op_type == "Transpose":
                for product in list(self._readers(node.output[0])):
                    self._put(product, parts.product(product))
                self.graph.node.remove(node)
            else:
                self._put(node, parts.product(node))

    def _put(self, old: onnx.NodeProto, new: onnx.NodeProto) -> None:
        position = list(self.graph.node).index(old)
        self.graph.node[position].CopyFrom(new)

    def _readers(self, value: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.graph.node if value in node.input)

    def _layout_of(self, weight: str, node: onnx.NodeProto) -> Layout | None:
        """How `node` takes `weight`."""
        match node.op_type:
            case "Gather":
                embeds = node.input[1] == "input_ids" and not _attributes(node).get("axis", 0)
                return Layout.ROWS if embeds else None
            case "Transpose":
                products = self._readers(node.output[0])
                ready = all(_multiplies_by(product, node.output[0]) for product in products)
                return Layout.ROWS if ready else None
            case "MatMul":
                return Layout.COLUMNS if _multiplies_by(node, weight) else None
            case "Gemm":
                return self._gemm_layout(weight, node)
        return None

    def _gemm_layout(self, weight: str, node: onnx.NodeProto) -> Layout | None:
        attributes = _attributes(node)
        scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
        bias_fits = len(node.input) < 3 or self.ranks.get(node.input[2]) == 1
        if node.input[1] != weight or scaled or attributes.get("transA") or not bias_fits:
            return None
        return Layout.ROWS if attributes.get("transB") else Layout.COLUMNS


def _multiplies_by(node: onnx.NodeProto, matrix: str) -> bool:
    return node.op_type == "MatMul" and node.input[1] == matrix and node.input[0] != matrix


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
