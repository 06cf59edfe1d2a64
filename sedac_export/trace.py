"""Trace engine modules to ONNX graphs whose weights are placeholders."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from sedac_export.decoder import find_mlp, replaced
from sedac_export.engines import (
    EmbedEngine,
    HeadEngine,
    KeyValueEngine,
    LayerEngine,
    Plan,
)
from sedac_export.errors import SedacError
from sedac_export.operators import AttentionRouter
from sedac_export.skeleton import Skeleton

OPSET = 24
_TOKENS, _CACHE = 4, 8


@dataclass(frozen=True)
class Graph:
    """A traced graph. `weights` maps initialiser names to the traced module's parameters."""

    model: onnx.ModelProto
    weights: dict[str, str]

    def inputs(self) -> list[str]:
        """Names of the graph's inputs, in order."""
        return [value.name for value in self.model.graph.input]


@dataclass(frozen=True)
class Tracer:
    """Traces the engines of one skeleton; use inside `fused_operators` and `stand_in_weights`."""

    skeleton: Skeleton
    plan: Plan
    router: AttentionRouter

    def embed(self) -> Graph:
        """input_ids, position_ids -> x and one output per context."""
        tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
        inputs = {"input_ids": tokens, "position_ids": torch.arange(_TOKENS)[None]}
        outputs = ["x", *(context.name for context in self.plan.contexts if context.used)]
        dynamic = {"input_ids": {1: "tokens"}, "position_ids": {1: "tokens"}}
        return _trace(EmbedEngine(self.skeleton, self.plan), inputs, outputs, dynamic)

    def head(self) -> Graph:
        """x -> logits."""
        inputs = {"x": self._hidden()}
        dynamic = {"x": {1: "tokens"}}
        graph = _trace(HeadEngine(self.skeleton, self.plan), inputs, ["logits"], dynamic)
        _untranspose(graph.model.graph)
        return graph

    def layer(self, index: int) -> Graph:
        """x, contexts, lengths and past -> y, present and stability."""
        lengths = {
            "seqlens_k": torch.tensor([_TOKENS - 1], dtype=torch.int32),
            "total_sequence_length": torch.tensor(_CACHE, dtype=torch.int32),
        }
        inputs = self._shared_inputs() | lengths | self._past(index)
        outputs = ["y", "present_key_0", "present_value_0", "stability"]
        module = LayerEngine(self.skeleton, self.plan, index, self.router)
        return _trace(module, inputs, outputs, self._dynamic())

    def attention(self, index: int) -> Graph:
        """As `layer`, but the MLP contributes nothing."""
        hidden = self.skeleton.config.hidden_size

        def nothing(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], hidden)

        with replaced(find_mlp(self.skeleton.layers[index]), nothing):
            return self.layer(index)

    def key_value(self, index: int) -> Graph:
        """x, contexts, write_index and past -> present."""
        where = {"write_index": torch.zeros(1, dtype=torch.int64)}
        inputs = self._shared_inputs() | where | self._past(index)
        module = KeyValueEngine(self.skeleton, self.plan, index, self.router)
        return _trace(module, inputs, ["present_key_0", "present_value_0"], self._dynamic())

    def _hidden(self) -> Tensor:
        return torch.zeros(1, _TOKENS, self.skeleton.config.hidden_size)

    def _shared_inputs(self) -> dict[str, Any]:
        contexts = [
            torch.zeros(
                tuple(_TOKENS if axis == 1 else n for axis, n in enumerate(c.shape)), dtype=c.dtype
            )
            for c in self.plan.contexts
        ]
        return {"x": self._hidden(), "contexts": contexts}

    def _past(self, index: int) -> dict[str, Tensor]:
        heads = self.plan.heads[index]
        past = torch.zeros(1, heads.count, _CACHE, heads.size)
        return {"past_key_0": past, "past_value_0": past.clone()}

    def _dynamic(self) -> dict[str, Any]:
        contexts = [{1: "tokens"} for _ in self.plan.contexts]
        past = {2: "cache_length"}
        return {"x": {1: "tokens"}, "contexts": contexts, "past_key_0": past, "past_value_0": past}


def _trace(
    module: nn.Module, inputs: dict[str, Any], outputs: list[str], dynamic: dict[str, Any]
) -> Graph:
    auto = torch.export.Dim.AUTO
    shapes = {
        name: _map(dynamic.get(name), lambda axes: dict.fromkeys(axes, auto)) for name in inputs
    }
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            dynamic_shapes=shapes,
            input_names=_flat_names(inputs),
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    return _to_graph(program.model, module)


def _to_graph(model: ir.Model, module: nn.Module) -> Graph:
    version = model.graph.opset_imports.get("")
    if version != OPSET:
        raise SedacError(
            f"torch.onnx exported opset {version} where {OPSET} was asked for; install the"
            " versions of the lock file"
        )
    _fix_reshapes(model.graph)
    RemoveUnusedNodesPass()(model)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights = {}
    for name, value in model.graph.initializers.items():
        if name in parameters:
            weights[name] = name
            value.const_value = _placeholder(name, value)
    proto = ir.to_proto(model)
    _drop_unused_inputs(proto.graph)
    _name_axes(proto)
    return Graph(proto, weights)


def _placeholder(name: str, value: ir.Value) -> ir.ExternalTensor:
    assert value.const_value is not None
    shape = value.const_value.shape
    return ir.ExternalTensor("", 0, 0, ir.DataType.FLOAT, shape=shape, name=name)  # type: ignore[arg-type]


def _fix_reshapes(graph: ir.Graph) -> None:
    """Give reshapes that leave one axis open a constant target: no shape arithmetic per run."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1] is None:
            continue
        shape = node.outputs[0].shape
        if shape is None or node.inputs[1].const_value is not None:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) <= 1:
            target = ir.tensor(sizes, dtype=ir.DataType.INT64, name=f"{node.outputs[0].name}_shape")
            value = ir.Value(name=target.name, const_value=target)
            graph.register_initializer(value)
            node.replace_input_with(1, value)


def _untranspose(graph: onnx.GraphProto) -> None:
    """Multiply by stored weights as they lie: MatMul(x, Transpose(W)) becomes Gemm(x, W).

    ONNX Runtime would fold the transposition into a second copy of W, and W is the largest weight
    of most models, often shared with the embedding.
    """
    sizes = {initializer.name: list(initializer.dims) for initializer in graph.initializer}
    transposed = {n.output[0]: n for n in graph.node if n.op_type == "Transpose"}
    for node in list(graph.node):
        transpose = transposed.get(node.input[1]) if node.op_type == "MatMul" else None
        if transpose is None or len(sizes.get(transpose.input[0], [])) != 2:
            continue
        outputs, inputs = sizes[transpose.input[0]]
        name, position = node.output[0], list(graph.node).index(node)
        for suffix, shape in (("rows", [-1, inputs]), ("shape", [1, -1, outputs])):
            tensor = helper.make_tensor(f"{name}_{suffix}", TensorProto.INT64, [len(shape)], shape)
            graph.initializer.append(tensor)
        flat, product = f"{name}_flat", f"{name}_product"
        weight, x = transpose.input[0], node.input[0]
        graph.node.remove(node)
        graph.node.remove(transpose)
        for offset, new in enumerate(
            (
                helper.make_node("Reshape", [x, f"{name}_rows"], [flat]),
                helper.make_node("Gemm", [flat, weight], [product], transB=1),
                helper.make_node("Reshape", [product, f"{name}_shape"], [name]),
            )
        ):
            graph.node.insert(position - 1 + offset, new)


def _drop_unused_inputs(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for value in list(graph.input):
        if value.name not in used:
            graph.input.remove(value)


def _name_axes(proto: onnx.ModelProto) -> None:
    """Name the open axes of inputs and outputs, and drop what only described the trace."""
    graph = proto.graph
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        for position, axis in enumerate(axes):
            if not axis.HasField("dim_value"):
                cache = len(axes) == 4 and position == 2
                axis.dim_param = "cache_length" if cache else "tokens"
        del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
    del graph.metadata_props[:]
    del proto.metadata_props[:]
    graph.doc_string = ""


def _flat_names(inputs: dict[str, Any]) -> list[str]:
    names = []
    for name, value in inputs.items():
        if isinstance(value, list):
            names += [f"context_{index}" for index in range(len(value))]
        else:
            names.append(name)
    return names


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, list):
        return [_map(item, function) for item in value]
    return None if value is None else function(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress and deprecations; users asked for neither."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
