"""Compose single-layer graphs into one engine of several layers."""

import onnx
from onnx import helper


def compose(layers: list[onnx.ModelProto]) -> onnx.ModelProto:
    """One graph that runs `layers` in order.

    Its inputs are those of a layer engine with one past_key_i and past_value_i per layer, its
    outputs y, present_key_i, present_value_i and the layers' stabilities side by side.
    """
    if len(layers) == 1:
        return layers[0]
    block = onnx.ModelProto()
    block.CopyFrom(layers[0])
    graph = block.graph
    for part in (graph.node, graph.initializer, graph.input, graph.output):
        del part[:]
    shared: dict[str, onnx.ValueInfoProto] = {}
    past, present = [], []
    hidden = "x"
    for index, layer in enumerate(layers):
        renamed = _renamed(layer, index, hidden, len(layers))
        graph.node.extend(renamed.node)
        graph.initializer.extend(renamed.initializer)
        for value in renamed.input:
            if value.name.startswith("past_"):
                past.append(value)
            elif index == 0 or value.name != hidden:
                shared.setdefault(value.name, value)
        present += [value for value in renamed.output if value.name.startswith("present_")]
        hidden = f"layer_{index}.y"
    stabilities = [f"layer_{index}.stability" for index in range(len(layers))]
    graph.node.append(helper.make_node("Concat", stabilities, ["stability"], axis=-1))
    graph.input.extend([*shared.values(), *past])
    graph.output.extend([_output(layers[-1], "y"), *present, _stability(layers[-1], len(layers))])
    return block


def _renamed(layer: onnx.ModelProto, index: int, hidden: str, count: int) -> onnx.GraphProto:
    """The layer's graph with unique names: inner ones prefixed, caches numbered."""
    graph = onnx.GraphProto()
    graph.CopyFrom(layer.graph)
    names = {"x": hidden, "y": "y" if index == count - 1 else f"layer_{index}.y"}
    for kind in ("past_key", "past_value", "present_key", "present_value"):
        names[f"{kind}_0"] = f"{kind}_{index}"
    for value in graph.input:
        names.setdefault(value.name, value.name)

    def rename(name: str) -> str:
        return names.get(name, f"layer_{index}.{name}") if name else name

    for node in graph.node:
        node.name = f"layer_{index}.{node.name}" if node.name else ""
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
    for item in [*graph.initializer, *graph.input, *graph.output]:
        item.name = rename(item.name)
    return graph


def _output(layer: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    value: onnx.ValueInfoProto = next(v for v in layer.graph.output if v.name == name)
    return value


def _stability(layer: onnx.ModelProto, count: int) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto()
    value.CopyFrom(_output(layer, "stability"))
    value.type.tensor_type.shape.dim[2].dim_value = count
    return value
