"""Merge operators of a traced layer for which ONNX Runtime's CPU kernels are faster as one.

What is merged is found by pattern: a layer that is built otherwise keeps the operators it has.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass, TopologicalSortPass

from sedac_export.arrays import Array

# in place of an open axis where the order of a tensor's numbers is followed
_TOKENS = 3
# how many times as wide as their input merged products may be: splitting the output copies it, and
# for gate and up that took more of a prefill than one product less saved
_WIDEST = 3


def fused(layer: onnx.ModelProto) -> onnx.ModelProto:
    """The graph of a layer with merged operators; its interface and its weights stay."""
    model = ir.from_proto(layer)
    _infer_shapes(model)
    _drop_round_trips(model.graph)
    _merge_products(model.graph)
    _rename_norms(model.graph)
    _shorten_stability(model.graph)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto


def _infer_shapes(model: ir.Model) -> None:
    """Give values their shapes, as far as they follow from the graph's inputs and weights."""
    ShapeInferencePass()(model)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":  # which onnx does not know
            output, query = node.outputs[0], _input(node, 0)
            output.shape, output.type = query.shape, query.type


def _rename_norms(graph: ir.Graph) -> None:
    """Take ONNX Runtime's older name of RMS norms, the one it merges with additions."""
    for node in graph:
        if node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"


def _shorten_stability(graph: ir.Graph) -> None:
    """Compute (cos(x, y) + 1) / 2 as |a + b|^2 / 4 of the unit vectors a and b along x and y."""
    x = next(value for value in graph.inputs if value.name == "x")
    y = next(value for value in graph.outputs if value.name == "y")
    units = [ir.node("LpNormalization", [value], {"axis": -1, "p": 2}) for value in (x, y)]
    total = ir.node("Add", [unit.outputs[0] for unit in units])
    axes = _constant(graph, "stability_axes", ir.tensor([-1]))
    square = ir.node("ReduceSumSquare", [total.outputs[0], axes], {"keepdims": 1})
    quarter = _constant(graph, "stability_quarter", ir.tensor(0.25, ir.DataType.FLOAT))
    result = ir.node("Mul", [square.outputs[0], quarter])
    graph.extend([*units, total, square, result])
    before = next(value for value in graph.outputs if value.name == "stability")
    before.replace_all_uses_with(result.outputs[0], replace_graph_outputs=True)
    result.outputs[0].name, before.name = before.name, None
    result.outputs[0].shape, result.outputs[0].type = before.shape, before.type


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """`tensor` as the initialiser `name` of `graph`."""
    tensor.name = name
    value = ir.Value(name=name, const_value=tensor)
    graph.register_initializer(value)
    return value


def _merge_products(graph: ir.Graph) -> None:
    """Multiply once with what several products of the same input multiply with."""
    groups: dict[tuple[ir.Value, str], list[_Product]] = defaultdict(list)
    for node in graph:
        product = _product(node)
        if product is not None:
            groups[_input(node, 0), product.kind].append(product)
    for products in groups.values():
        narrow = sum(product.rows for product in products) <= _WIDEST * products[0].columns
        for merged in [products] if narrow else [[product] for product in products]:
            _merge(graph, merged)


@dataclass(frozen=True)
class _Product:
    """A product with a stored matrix [rows, columns], and the operator to take for `node`.

    factors: what is stored of the matrix; all have its rows.
    """

    node: ir.Node
    operator: str
    attributes: dict[str, int]
    factors: list[ir.Value | None]
    rows: int
    columns: int

    @property
    def kind(self) -> str:
        """The same for products that can be merged."""
        kept = [factor is not None for factor in self.factors]
        return f"{self.operator} {self.attributes} {kept}"


def _product(node: ir.Node) -> _Product | None:
    """What `node` multiplies, None where it is no product with a stored matrix."""
    if node.op_type == "MatMulNBits":
        attributes = {name: value.as_int() for name, value in node.attributes.items()}
        size = attributes.pop("N"), attributes["K"]
        return _Product(node, node.op_type, attributes, list(node.inputs[1:]), *size)
    weight = _transposed(node.inputs[1]) if node.op_type == "MatMul" else None
    if weight is None or weight.shape is None:
        return None
    # as it is stored: its transpose would be folded into a copy of it while the engine is loaded
    return _Product(node, "FusedMatMul", {"transB": 1}, [weight], *weight.shape.numpy())


def _transposed(matrix: ir.Value | None) -> ir.Value | None:
    """The stored matrix that `matrix` is the transpose of, if it is one."""
    node = None if matrix is None else matrix.producer()
    if node is None or node.op_type != "Transpose":
        return None
    source = weight = _input(node, 0)
    cast = source.producer()
    if cast is not None and cast.op_type == "Cast":
        source = _input(cast, 0)
    return weight if source.is_initializer() else None


def _merge(graph: ir.Graph, products: list[_Product]) -> None:
    """Compute all `products`, which are of the same input and kind, in one."""
    first = products[0]
    attributes = dict(first.attributes)
    if first.operator == "MatMulNBits":
        attributes["N"] = sum(product.rows for product in products)
    stacks = zip(*(product.factors for product in products), strict=True)
    inputs = [first.node.inputs[0], *(_stack(graph, list(stack)) for stack in stacks)]
    merged = ir.node(first.operator, inputs, attributes, domain="com.microsoft")
    graph.append(merged)
    results = merged.outputs
    if len(products) > 1:
        lengths = ir.tensor([product.rows for product in products])
        sizes = _constant(graph, f"{first.node.outputs[0].name}_sizes", lengths)
        inputs = [merged.outputs[0], sizes]
        split = ir.node("Split", inputs, {"axis": -1}, num_outputs=len(products))
        graph.append(split)
        results = split.outputs
    for product, result in zip(products, results, strict=True):
        product.node.outputs[0].replace_all_uses_with(result)


def _stack(graph: ir.Graph, factors: list[ir.Value | None]) -> ir.Value | None:
    """`factors` on top of each other, which ONNX Runtime folds when it loads the engine."""
    if len(factors) == 1 or factors[0] is None:
        return factors[0]
    node = ir.node("Concat", factors, {"axis": 0})
    graph.append(node)
    return node.outputs[0]


def _drop_round_trips(graph: ir.Graph) -> None:
    """Read what is laid out as its source was, such as heads taken apart and joined, from there."""
    for node in graph:
        for position, value in enumerate(node.inputs):
            path: list[ir.Node] = []
            source = value
            while source is not None and (change := _layout_change(source)) is not None:
                path.insert(0, change)
                source = _input(change, 0)
                if _comes_to_nothing(path, source):
                    node.replace_input_with(position, source)


def _layout_change(value: ir.Value) -> ir.Node | None:
    """What makes `value` by a known change of layout, if anything does."""
    node = value.producer()
    if node is None or node.op_type not in ("Identity", "Reshape", "Transpose"):
        return None
    known = node.op_type != "Reshape" or _input(node, 1).const_value is not None
    return node if known else None


def _comes_to_nothing(path: list[ir.Node], source: ir.Value) -> bool:
    """Whether `source` is the same after the changes of layout on `path`."""
    if source.shape is None or sum(not isinstance(size, int) for size in source.shape) > 1:
        return False
    shape = [size if isinstance(size, int) else _TOKENS for size in source.shape]
    before: Array = np.arange(np.prod(shape)).reshape(shape)
    after = before
    for node in path:
        after = _laid_out(after, node)
    return np.array_equal(before, after)


def _laid_out(x: Array, node: ir.Node) -> Array:
    """`x` as `node` gives it."""
    match node.op_type:
        case "Transpose":
            return x.transpose(node.attributes["perm"].as_ints())
        case "Reshape":
            target = _input(node, 1).const_value
            assert target is not None
            sizes = target.numpy().tolist()
            return x.reshape([size or x.shape[axis] for axis, size in enumerate(sizes)])
    return x


def _input(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None
    return value
