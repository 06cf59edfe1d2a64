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
from sedac_export.graph.packed_attention import RotaryTables, pack_attention

# in place of an open axis where the order of a tensor's numbers is followed
_TOKENS = 3
# how many times as wide as their input merged products may be: splitting the output copies it, and
# for gate and up that took more of a prefill than one product less saved
_WIDEST = 3
# of norms that only give a length: a residual stream of zeros has none
_LENGTH = {"epsilon": 1e-30}


def fused(layer: onnx.ModelProto, tables: RotaryTables) -> onnx.ModelProto:
    """The graph of a layer with merged operators.

    Its weights stay, and its interface but for context tensors whose `tables` attention reads.
    """
    model = ir.from_proto(layer)
    _infer_shapes(model)
    _drop_round_trips(model.graph)
    _merge_products(model.graph)
    pack_attention(model.graph, tables)
    _merge_norms(model.graph)
    _shorten_stability(model.graph)
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    _drop_unread(model.graph, tables)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto


def _infer_shapes(model: ir.Model) -> None:
    """Give values their shapes, as far as they follow from the graph's inputs and weights."""
    ShapeInferencePass()(model)
    while sum(_infer_shape(node) for node in model.graph) > 0:
        ShapeInferencePass()(model)


def _infer_shape(node: ir.Node) -> bool:
    """Give the result of `node`, which onnx does not know, its shape if it follows now."""
    if node.op_type not in ("GroupQueryAttention", "MatMulNBits"):
        return False
    output, source = node.outputs[0], _input(node, 0)
    if output.shape is not None or source.shape is None:
        return False
    sizes = list(source.shape)
    if node.op_type == "MatMulNBits":
        sizes[-1] = node.attributes["N"].as_int()
    output.shape, output.type = ir.Shape(sizes), source.type
    return True


def _merge_norms(graph: ir.Graph) -> None:
    """Add what is normalised in the same operator, ONNX Runtime's, which has other names."""
    for node in list(graph):
        if node.op_type != "RMSNormalization":
            continue
        total = _input(node, 0)
        addition = total.producer()
        if addition is None or not _adds_alike(addition) or total.is_graph_output():
            node.op_type = "SimplifiedLayerNormalization"
            continue
        epsilon = node.attributes["epsilon"].as_float()
        merged = _sum_and_norm(addition, _input(node, 1), epsilon)
        graph.append(merged)
        for before, after in ((node.outputs[0], 0), (total, 3)):
            merged.outputs[after].shape, merged.outputs[after].type = before.shape, before.type
            before.replace_all_uses_with(merged.outputs[after])


def _sum_and_norm(addition: ir.Node, weight: ir.Value, epsilon: float) -> ir.Node:
    """What gives the RMS norm of a sum as its first output and the sum as its fourth."""
    return ir.node(
        "SkipSimplifiedLayerNormalization",
        [*addition.inputs, weight],
        {"epsilon": epsilon},
        domain="com.microsoft",
        # what training reads of the norm is left out
        outputs=[ir.Value(), ir.Value(name=""), ir.Value(name=""), ir.Value()],
    )


def _adds_alike(node: ir.Node) -> bool:
    """Whether `node` adds two tensors of one shape, [1, tokens, numbers]."""
    if node.op_type != "Add":
        return False
    first, second = (_sizes(_input(node, position)) for position in (0, 1))
    return first == second and len(first) == 3


def _sizes(value: ir.Value) -> list[int]:
    """The sizes of `value`, with _TOKENS for an open one; none where they are not known."""
    sizes = [] if value.shape is None else list(value.shape)
    return [size if isinstance(size, int) else _TOKENS for size in sizes]


def _drop_unread(graph: ir.Graph, tables: RotaryTables) -> None:
    """Drop inputs in whose place attention reads `tables`."""
    for value in list(graph.inputs):
        if value.name in tables and not value.uses():
            graph.inputs.remove(value)


def _shorten_stability(graph: ir.Graph) -> None:
    """Compute (cos(x, y) + 1) / 2 as |a + b|^2 of vectors of length 1/2 along x and y.

    An RMS norm gives such a vector, and the addition that gives y is merged with it: three
    operators more in place of a dozen. The result is as far from the exact one as by dot products,
    some 1e-6 (tests/export/graph/test_fusion.py).
    """
    x = next(value for value in graph.inputs if value.name == "x")
    y = next(value for value in graph.outputs if value.name == "y")
    size = _sizes(x)[-1]
    length = np.full(size, 0.5 * size**-0.5, dtype=np.float32)
    halves = _constant(graph, "stability_halves", ir.tensor(length))
    along_x = ir.node("SimplifiedLayerNormalization", [x, halves], _LENGTH)
    graph.append(along_x)
    along_y = _along_sum(graph, y, halves)
    total = ir.node("Add", [along_x.outputs[0], along_y])
    axes = _constant(graph, "stability_axes", ir.tensor([-1]))
    square = ir.node("ReduceSumSquare", [total.outputs[0], axes], {"keepdims": 1})
    graph.extend([total, square])
    before = next(value for value in graph.outputs if value.name == "stability")
    _replace_output(before, square.outputs[0])


def _along_sum(graph: ir.Graph, y: ir.Value, halves: ir.Value) -> ir.Value:
    """The vector of length 1/2 along `y`, by the operator that gives `y` where that is a sum."""
    addition = y.producer()
    if addition is None or not _adds_alike(addition):
        norm = ir.node("SimplifiedLayerNormalization", [y, halves], _LENGTH)
        graph.append(norm)
        return norm.outputs[0]
    merged = _sum_and_norm(addition, halves, _LENGTH["epsilon"])
    graph.append(merged)
    _replace_output(y, merged.outputs[3])
    return merged.outputs[0]


def _replace_output(before: ir.Value, after: ir.Value) -> None:
    """Make `after` the graph's output in place of `before`, under its name."""
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    after.name, before.name = before.name, None
    after.shape, after.type = before.shape, before.type


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

    factors: what is stored of the matrix; all have its rows. bias: what is added to each row of the
    product, giving `result`; without one that is the product's own.
    """

    node: ir.Node
    operator: str
    attributes: dict[str, int]
    factors: list[ir.Value | None]
    rows: int
    columns: int
    bias: ir.Value | None
    result: ir.Value

    @property
    def kind(self) -> str:
        """The same for products that can be merged."""
        kept = [factor is not None for factor in (*self.factors, self.bias)]
        return f"{self.operator} {self.attributes} {kept}"


def _product(node: ir.Node) -> _Product | None:
    """What `node` multiplies, None where it is no product with a stored matrix."""
    if node.op_type not in ("MatMul", "MatMulNBits"):
        return None
    bias, result = _bias(node.outputs[0])
    if node.op_type == "MatMulNBits":
        attributes = {name: value.as_int() for name, value in node.attributes.items()}
        rows, columns, factors = attributes.pop("N"), attributes["K"], list(node.inputs[1:])
        return _Product(node, node.op_type, attributes, factors, rows, columns, bias, result)
    weight = _transposed(node.inputs[1])
    if weight is None or weight.shape is None:
        return None
    # as it is stored: its transpose would be folded into a copy of it while the engine is loaded
    rows, columns = weight.shape.numpy()
    return _Product(node, "FusedMatMul", {"transB": 1}, [weight], rows, columns, bias, result)


def _bias(product: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """The stored vector that is added to `product` if that is all it is used for, and the sum."""
    users = [node for node, _ in product.uses()]
    if len(users) != 1 or users[0].op_type != "Add" or product.is_graph_output():
        return None, product
    bias = next((value for value in users[0].inputs if value is not product), None)
    if bias is None or not _is_stored(bias) or len(_sizes(bias)) != 1:
        return None, product
    return bias, users[0].outputs[0]


def _is_stored(value: ir.Value) -> bool:
    """Whether `value` is a weight, in the precision that it is stored in or cast from it."""
    node = value.producer()
    source = _input(node, 0) if node is not None and node.op_type == "Cast" else value
    return source.is_initializer()


def _transposed(matrix: ir.Value | None) -> ir.Value | None:
    """The stored matrix that `matrix` is the transpose of, if it is one."""
    node = None if matrix is None else matrix.producer()
    if node is None or node.op_type != "Transpose":
        return None
    weight = _input(node, 0)
    return weight if _is_stored(weight) else None


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
    if first.bias is not None:
        bias = _stack(graph, [product.bias for product in products])
        merged = ir.node("Add", [merged.outputs[0], bias])
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
        result.shape, result.type = product.result.shape, product.result.type
        product.result.replace_all_uses_with(result)


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
    shape = _sizes(source)
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
