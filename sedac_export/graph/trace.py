"""Trace engine modules to ONNX graphs whose weights are placeholders."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from sedac_export.errors import SedacError
from sedac_export.graph.modules import (
    EmbedModule,
    HeadModule,
    KeyValueModule,
    LayerInterface,
    LayerModule,
)
from sedac_export.graph.operators import AttentionRouter
from sedac_export.model.decoder import find_mlp, replaced
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.weights import weights_of

OPSET = 24
_TOKENS, _CACHE = 4, 8


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph. `weights` maps initialiser names to the traced module's weights."""

    model: onnx.ModelProto
    weights: dict[str, str]

    def inputs(self) -> list[str]:
        """Names of the graph's inputs, in order."""
        return [value.name for value in self.model.graph.input]

    def of_part(self, part: onnx.ModelProto) -> "TracedGraph":
        """The graph `part`, some of whose initialisers may be this one's weights."""
        held = {initializer.name for initializer in part.graph.initializer}
        return TracedGraph(part, {n: w for n, w in self.weights.items() if n in held})


@dataclass(frozen=True)
class Tracer:
    """Traces the engines of one skeleton; use inside `fused_operators` and `stand_in_weights`.

    dtype is that of the stand-in weights, and so of the residual stream. soft_exits says whether
    `attention` is among the engines that the form has: soft exits run on CPUs only.
    """

    soft_exits: ClassVar[bool] = True

    skeleton: Skeleton
    interface: LayerInterface
    router: AttentionRouter
    dtype: torch.dtype = torch.float32

    def embed(self) -> TracedGraph:
        """input_ids, position_ids -> x and each context, for `split_embed` to split."""
        positions = torch.arange(_TOKENS).repeat(self.interface.batch, 1)
        inputs = {"input_ids": positions + 2, "position_ids": positions}
        outputs = ["x", *(context.name for context in self.interface.contexts if context.used)]
        dynamic = dict.fromkeys(inputs, self._rows)
        return trace(EmbedModule(self.skeleton, self.interface), inputs, outputs, dynamic)

    def head(self) -> TracedGraph:
        """x -> logits."""
        inputs = {"x": self.hidden()}
        dynamic = {"x": self._rows}
        graph = trace(HeadModule(self.skeleton, self.interface), inputs, ["logits"], dynamic)
        _untranspose(graph.model.graph)
        return graph

    def layer(self, index: int) -> TracedGraph:
        """x, contexts, lengths and past -> y, present and stability."""
        lengths = {
            "seqlens_k": torch.tensor([_TOKENS - 1], dtype=torch.int32),
            "total_sequence_length": torch.tensor(_CACHE, dtype=torch.int32),
        }
        inputs = self.shared_inputs() | lengths | self.past(index)
        outputs = ["y", "present_key_0", "present_value_0", "stability"]
        module = LayerModule(self.skeleton, self.interface, index, self.router)
        return trace(module, inputs, outputs, self.dynamic())

    def attention(self, index: int) -> TracedGraph:
        """As `layer`, but the MLP contributes nothing."""
        hidden = self.skeleton.config.hidden_size

        def nothing(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], hidden)

        with replaced(find_mlp(self.skeleton.layers[index]), nothing):
            return self.layer(index)

    def key_value(self, index: int) -> TracedGraph:
        """x, contexts, write_index and past -> present."""
        inputs = self.shared_inputs() | self.write_index() | self.past(index)
        module = KeyValueModule(self.skeleton, self.interface, index, self.router)
        return trace(module, inputs, ["present_key_0", "present_value_0"], self.dynamic())

    def write_index(self) -> dict[str, Tensor]:
        """Where in the cache a pass writes."""
        return {"write_index": torch.full((self.interface.batch,), 3)}

    def shared_inputs(self) -> dict[str, Any]:
        """What every engine of a layer takes: the residual stream and the contexts."""
        contexts = [
            stand_in([_TOKENS if axis == 1 else n for axis, n in enumerate(c.shape)], c.dtype)
            for c in self.interface.contexts
        ]
        return {"x": self.hidden(), "contexts": contexts}

    def past(self, index: int) -> dict[str, Tensor]:
        """The caches of layer `index`."""
        heads = self.interface.heads[index]
        past = stand_in([self.interface.batch, heads.count, _CACHE, heads.size], self.dtype)
        return {"past_key_0": past, "past_value_0": past.clone()}

    def dynamic(self) -> dict[str, Any]:
        """The open axes of what every engine of a layer takes."""
        # a context that is the same for all sequences keeps its one row
        contexts = [
            self._rows if c.shape[:1] == (self.interface.batch,) else {1: "tokens"}
            for c in self.interface.contexts
        ]
        past = self._batch | {2: "cache_length"}
        return {
            "x": self._rows,
            "contexts": contexts,
            "write_index": self._batch,
            "past_key_0": past,
            "past_value_0": past,
        }

    def hidden(self) -> Tensor:
        """A residual stream."""
        size = self.skeleton.config.hidden_size
        return stand_in([self.interface.batch, _TOKENS, size], self.dtype)

    @property
    def _batch(self) -> dict[int, str]:
        return {0: "batch"} if self.interface.batch > 1 else {}

    @property
    def _rows(self) -> dict[int, str]:
        return self._batch | {1: "tokens"}


def stand_in(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Numbers that look like nothing in particular: none is zero or one, truth values aside."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.empty(shape).uniform_(0.05, 0.95, generator=generator).to(dtype)
    least, end = (0, 2) if dtype == torch.bool else (2, 100)
    return torch.randint(least, end, shape, generator=generator).to(dtype)


def trace(
    module: nn.Module, inputs: dict[str, Any], outputs: list[str], dynamic: dict[str, Any]
) -> TracedGraph:
    """Trace `module` called with `inputs`; dynamic gives the open axes of each, by number."""
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


def _to_graph(model: ir.Model, module: nn.Module) -> TracedGraph:
    version = model.graph.opset_imports.get("")
    if version != OPSET:
        raise SedacError(
            f"torch.onnx exported opset {version} where {OPSET} was asked for; install the"
            " versions of the lock file"
        )
    _fix_reshapes(model.graph)
    RemoveUnusedNodesPass()(model)
    known = dict(weights_of(module))
    weights = {}
    for name, value in model.graph.initializers.items():
        if name in known:
            weights[name] = name
            value.const_value = _placeholder(name, value)
    proto = ir.to_proto(model)
    _drop_unused_inputs(proto.graph)
    _name_axes(proto)
    return TracedGraph(proto, weights)


def _placeholder(name: str, value: ir.Value) -> ir.ExternalTensor:
    assert value.const_value is not None
    shape = value.const_value.shape
    dtype = value.const_value.dtype
    return ir.ExternalTensor("", 0, 0, dtype, shape=shape, name=name)  # type: ignore[arg-type]


def _fix_reshapes(graph: ir.Graph) -> None:
    """Give reshapes that leave one axis open a constant target: no shape arithmetic per run."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1] is None:
            continue
        shape = node.outputs[0].shape
        if shape is None or node.inputs[1].const_value is not None:
            continue
        before = node.inputs[0]
        sizes = _target(None if before is None else before.shape, shape)
        if sizes.count(-1) <= 1:
            target = ir.tensor(sizes, dtype=ir.DataType.INT64, name=f"{node.outputs[0].name}_shape")
            value = ir.Value(name=target.name, const_value=target)
            graph.register_initializer(value)
            node.replace_input_with(1, value)
            node.attributes.pop("allowzero", None)


def _target(before: ir.Shape | None, after: ir.Shape) -> list[int]:
    """A reshape's target: open axes are -1 or, of several, 0 for those that stay in place."""
    sizes = [size if isinstance(size, int) else -1 for size in after]
    if before is not None and sizes.count(-1) > 1:
        for axis, (old, new) in enumerate(zip(before, after, strict=False)):
            if sizes[axis] == -1 and old == new:
                sizes[axis] = 0
    return sizes


def _untranspose(graph: onnx.GraphProto) -> None:
    """Multiply by stored weights as they are laid out: MatMul(x, Transpose(W)) becomes Gemm(x, W).

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
                axis.dim_param = _axis_name(value.name, position)
        del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
    del graph.metadata_props[:]
    del proto.metadata_props[:]
    graph.doc_string = ""


def _axis_name(value: str, position: int) -> str:
    if value.startswith("mask"):
        return ("batch", "", "tokens", "cache_length")[position]
    cache = value.startswith(("past_", "present_"))
    return ("batch", "", "cache_length")[position] if cache else ("batch", "tokens")[position]


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
