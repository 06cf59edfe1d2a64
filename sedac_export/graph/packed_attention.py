"""Let attention take query, key and value from one product and rotate them itself."""

from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir

# of GroupQueryAttention's inputs: query, key and value, and where the rotary tables are
_QUERY, _KEY, _VALUE, _TABLES = 0, 1, 2, 7
# heads of other sizes are rotated by the separate operator only
_HEAD_SIZE = 16

# rotary tables by the name of the context tensor that is a part of them
RotaryTables = Mapping[str, ir.ExternalTensor]


def rotary_contexts(layers: Iterable[onnx.ModelProto]) -> set[str]:
    """The context tensors by which `layers`, as traced, rotate."""
    return {
        name
        for layer in layers
        for node in layer.graph.node
        if node.op_type == "RotaryEmbedding"
        for name in node.input[1:3]
    }


def pack_attention(graph: ir.Graph, tables: RotaryTables) -> None:
    """Replace what takes a product apart for GroupQueryAttention, and rotates the parts.

    Attention finds a token's row of a table by its position, so that tables hold all positions. It
    stays as it is where something else happens to query or key on the way, such as a norm.
    """
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            _pack(graph, node, tables)


def _pack(graph: ir.Graph, node: ir.Node, tables: RotaryTables) -> None:
    query, key = (_rotation(node.inputs[position]) for position in (_QUERY, _KEY))
    parts = [
        node.inputs[position] if rotation is None else rotation.inputs[0]
        for position, rotation in ((_QUERY, query), (_KEY, key), (_VALUE, None))
    ]
    split = None if parts[0] is None else parts[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != parts:
        return
    if any(value is not None for value in node.inputs[_TABLES:]):
        return
    if query is not None and key is not None:
        if not _rotates_alike(query, key, parts[1], node, tables):
            return
        names = [_name(value) for value in query.inputs[1:3]]
        node.resize_inputs(_TABLES + 2)
        for position, name in enumerate(names, _TABLES):
            node.replace_input_with(position, _table(graph, name, tables))
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
        interleaved = query.attributes.get_int("interleaved", 0)
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", interleaved)
    elif query is not key:
        return
    node.replace_input_with(_QUERY, split.inputs[0])
    node.replace_input_with(_KEY, None)
    node.replace_input_with(_VALUE, None)


def _rotation(value: ir.Value | None) -> ir.Node | None:
    """What rotates `value`, if anything does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _rotates_alike(
    query: ir.Node, key: ir.Node, part: ir.Value | None, node: ir.Node, tables: RotaryTables
) -> bool:
    """Whether `node`, attention, can rotate whole heads as `query` and `key` do."""
    if query.inputs[1:] != key.inputs[1:] or len(query.inputs) != 3:
        return False
    if any(_name(value) not in tables for value in query.inputs[1:]):
        return False
    if part is None or part.shape is None:
        return False
    ways = [
        (n.attributes.get_int("interleaved", 0), n.attributes.get_int("rotary_embedding_dim", 0))
        for n in (query, key)
    ]
    if ways[0] != ways[1] or ways[0][1]:
        return False
    rotated = 2 * tables[_name(query.inputs[1])].shape.numpy()[-1]
    key_size = node.attributes["kv_num_heads"].as_int() * rotated
    return rotated % _HEAD_SIZE == 0 and part.shape[-1] == key_size


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)


def _table(graph: ir.Graph, context: str, tables: RotaryTables) -> ir.Value:
    """The table of `context` as an initialiser of `graph`."""
    name = f"{context}_table"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=tables[context]))
    return graph.initializers[name]
