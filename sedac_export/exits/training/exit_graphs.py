"""Graphs of trained exits: the risk output of a layer engine, the exit engine, the lens."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from sedac_export.exits.replay.probes import LEARNED_WIDTH, SCALARS, LearnedProbe, LREProbe
from sedac_export.exits.training.head_graph import HeadGraph, quantized_product
from sedac_export.exits.training.lens import Adapter, Lens
from sedac_export.graph.trace import OPSET

_PREFIX = "sedac_risk_"
_EXIT = "sedac_exit_"
NORMED = f"{_EXIT}normed"
SCALARS_NAME = f"{_EXIT}scalars"


class GraphBuilder:
    """Nodes and constants that are added one after the other, their names under a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node of one output; the output's name."""
        name = output or f"{self.prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def split(self, value: str, sizes: list[int]) -> list[str]:
        """Parts of `value` along its last axis."""
        names = [f"{self.prefix}{len(self.nodes)}_{part}" for part in range(len(sizes))]
        inputs = [value, self.constant(np.array(sizes, dtype=np.int64))]
        self.nodes.append(helper.make_node("Split", inputs, names, axis=-1))
        return names

    def constant(self, value: npt.NDArray[np.generic] | torch.Tensor) -> str:
        """A constant's name."""
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def with_risk(layer: onnx.ModelProto, probe: LREProbe) -> onnx.ModelProto:
    """The layer engine's graph with the probe on `y` and its output `risk` [1, tokens, 1].

    A probe that the graph has from earlier is replaced.
    """
    model = without_risk(layer)
    build = GraphBuilder(_PREFIX)
    down = build.add("MatMul", "y", build.constant(probe.down.weight.T))
    weights = build.constant(probe.norm.weight), build.constant(probe.norm.bias)
    normed = build.add("LayerNormalization", down, *weights, axis=-1, epsilon=probe.norm.eps)
    up = build.add("MatMul", normed, build.constant(probe.up.weight.T))
    shifted = build.add("Add", up, build.constant(probe.up.bias))
    build.add("Softplus", shifted, output="risk")
    graph = model.graph
    graph.node.extend(build.nodes)
    graph.initializer.extend(build.constants)
    graph.output.append(helper.make_tensor_value_info("risk", TensorProto.FLOAT, [1, "tokens", 1]))
    return model


def without_risk(layer: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the layer engine's graph without a probe."""
    model = onnx.ModelProto()
    model.CopyFrom(layer)
    graph = model.graph
    for node in list(graph.node):
        if node.output[0] == "risk" or node.output[0].startswith(_PREFIX):
            graph.node.remove(node)
    for initializer in list(graph.initializer):
        if initializer.name.startswith(_PREFIX):
            graph.initializer.remove(initializer)
    for output in list(graph.output):
        if output.name == "risk":
            graph.output.remove(output)
    return model


def exit_engine(
    head: HeadGraph,
    directory: Path,
    tokens: npt.NDArray[np.int64],
    probe: LearnedProbe,
    lens: Lens | None,
) -> onnx.ModelProto:
    """x [1, tokens, hidden], stability [1, tokens, 3] -> signals [1, tokens, 3].

    The pruned head is the head's graph with the rows of `tokens` only. They and the probe's first
    layer read the same normed state, so both are rows of one product.
    """
    build = GraphBuilder(_EXIT)
    before, after = head.before(), head.after()
    start = _through_lens(build, before, lens)
    normed, product = head.product.input[0], f"{_EXIT}product"
    rows = np.concatenate([head.rows(tokens), probe.state.weight.detach().numpy()])
    node, weights = quantized_product(normed, rows, product)
    build.nodes += [*start, node]
    build.constants += weights
    logits, inner = build.split(product, [len(tokens), LEARNED_WIDTH])
    if head.bias is not None:
        logits = build.add("Add", logits, build.constant(head.bias[tokens].astype(np.float32)))
    build.add("Identity", logits, output=head.product.output[0])
    build.nodes += after
    build.constants += head.constants([*before, *after], directory, tokens)
    _signals(build, probe, inner)
    return _model(head.model, build, {"x": None, "stability": 3}, ("signals", 3))


def features_model(engine: onnx.ModelProto, head: HeadGraph) -> onnx.ModelProto:
    """An exit engine that gives what its probe reads instead: NORMED and SCALARS_NAME.

    The probe so trains on the numbers it will see, rounded weights included.
    """
    model = onnx.ModelProto()
    model.CopyFrom(engine)
    width: list[str | int | None] = [1, "tokens", head.width]
    flat = [helper.make_node("Reshape", [head.product.input[0], f"{_EXIT}width"], [NORMED])]
    model.graph.node.extend(flat)
    shape = np.array([1, -1, head.width], dtype=np.int64)
    model.graph.initializer.append(numpy_helper.from_array(shape, f"{_EXIT}width"))
    del model.graph.output[:]
    scalars: list[str | int | None] = [1, "tokens", SCALARS]
    for name, size in ((NORMED, width), (SCALARS_NAME, scalars)):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))
    return model


def lens_engine(head: HeadGraph, lens: Lens) -> onnx.ModelProto:
    """x [1, tokens, hidden] -> y [1, tokens, hidden]."""
    build = GraphBuilder("sedac_lens_")
    _add_lens(build, lens, "y")
    hidden = next(lens.parameters()).shape[-1]
    return _model(head.model, build, {"x": None}, ("y", hidden))


def _add_lens(build: GraphBuilder, lens: Lens, output: str = "") -> str:
    """What the lens gives of `x`: the name of it."""
    if not isinstance(lens, Adapter):
        product = _product(build, "x", lens)
        return build.add("Add", product, build.constant(lens.bias), output=output)
    norm = lens.norm
    weight = build.constant(norm.weight)
    normed = build.add("RMSNormalization", "x", weight, axis=-1, epsilon=norm.eps)
    gate = _product(build, normed, lens.gate)
    active = build.add("Mul", gate, build.add("Sigmoid", gate))
    inner = build.add("Mul", active, _product(build, normed, lens.up))
    return build.add("Add", "x", _product(build, inner, lens.down), output=output)


def _product(build: GraphBuilder, value: str, linear: torch.nn.Linear) -> str:
    return build.add("MatMul", value, build.constant(linear.weight.T))


def _through_lens(
    build: GraphBuilder, before: list[onnx.NodeProto], lens: Lens | None
) -> list[onnx.NodeProto]:
    """The nodes `before` the product, reading what the lens gives where there is one."""
    if lens is None:
        return before
    seen = _add_lens(build, lens)
    moved = []
    for node in before:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [seen if name == "x" else name for name in node.input]
        moved.append(copy)
    return moved


def _signals(build: GraphBuilder, probe: LearnedProbe, inner: str) -> None:
    """margin, entropy and learned of `logits` and the probe's first layer.

    For one token the number of nodes is what costs, so all that is linear in the scalars is one
    product: the probe's first layer, its linear path, margin and entropy.
    """
    last = build.constant(np.array([-1], dtype=np.int64))
    two = build.constant(np.array([2], dtype=np.int64))
    logs = build.add("LogSoftmax", "logits", axis=-1)
    weighted = build.add("Mul", build.add("Exp", logs), logs)
    minus_entropy = build.add("ReduceSum", weighted, last, keepdims=1)
    top = f"{_EXIT}top"
    build.nodes.append(helper.make_node("TopK", [logs, two], [top, f"{top}_indices"], axis=-1))
    parts = (top, build.add("Exp", top), minus_entropy, "stability")
    scalars = build.add("Concat", *parts, output=SCALARS_NAME, axis=-1)
    reported = torch.zeros(2, SCALARS)
    reported[0, 2], reported[0, 3], reported[1, 4] = 1, -1, -1
    weights = torch.cat([probe.scalars.weight, probe.linear.weight, reported])
    biases = torch.cat([probe.scalars.bias, probe.linear.bias, torch.zeros(2)])
    product = build.add("MatMul", scalars, build.constant(weights.T))
    shifted = build.add("Add", product, build.constant(biases))
    hidden, linear, margin_and_entropy = build.split(shifted, [LEARNED_WIDTH, 1, 2])
    active = build.add("Relu", build.add("Add", inner, hidden))
    logit = build.add("Add", build.add("MatMul", active, build.constant(probe.up.weight.T)), linear)
    build.add("Concat", margin_and_entropy, build.add("Sigmoid", logit), output="signals", axis=-1)


def _model(
    head: onnx.ModelProto,
    build: GraphBuilder,
    inputs: dict[str, int | None],
    output: tuple[str, int],
) -> onnx.ModelProto:
    hidden = next(v for v in head.graph.input if v.name == "x").type.tensor_type.shape.dim[2]
    taken = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, [1, "tokens", hidden.dim_value if size is None else size]
        )
        for name, size in inputs.items()
    ]
    name, size = output
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", size])]
    graph = helper.make_graph(build.nodes, "exit", taken, given, build.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=head.ir_version)
