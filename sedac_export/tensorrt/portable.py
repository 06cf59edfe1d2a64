"""The portable graphs: strongly typed ONNX that TensorRT parses, for any batch of sequences.

Layers update their caches by TensorScatter and attend by Attention with a mask; both are operators
of ONNX's own opset 24. Nothing in them knows a sequence's length but the mask.
"""

from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from sedac_export.device_graphs.graph_writer import MASK, WINDOW_MASK
from sedac_export.graph.constants import constants
from sedac_export.graph.modules import (
    HeadModule,
    RecordingCache,
    SingleLayerModule,
    run_layer,
    stability,
    whole,
)
from sedac_export.graph.operators import masked_attention, scatter
from sedac_export.graph.trace import TracedGraph, Tracer, stand_in, trace

# traced with more than one sequence, so that no axis is taken for the constant 1
BATCH = 2


class PortableLayerModule(SingleLayerModule):
    """One decoder layer with its cache and stability output.

    x [batch, tokens, hidden], contexts, mask bool [batch, 1, tokens, cache length], write_index
    int64 [batch], past_key, past_value [batch, heads, cache length, head size] -> y like x,
    present_key, present_value like past, stability fp32 [batch, tokens, 1].
    """

    window = -1

    def forward(
        self,
        x: Tensor,
        contexts: list[Tensor],
        mask: Tensor,
        write_index: Tensor,
        past_key_0: Tensor,
        past_value_0: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trace this; `window` is then the number of positions that the layer sees, -1 for all."""
        cache = _ScatterCache((past_key_0, past_value_0), write_index, mask)
        y = run_layer(self.layer, self.call, x, whole(self.interface, contexts), cache, self.router)
        self.window = cache.window
        return y, *cache.present, stability(x, y)


class _ScatterCache(RecordingCache):
    window = -1
    present: tuple[Tensor, Tensor]

    def __init__(self, past: tuple[Tensor, Tensor], write_index: Tensor, mask: Tensor) -> None:
        self.past, self.write_index, self.mask = past, write_index, mask

    def attend(self, query: Tensor, **settings: Any) -> Tensor:
        self.window = settings.pop("window")
        past_key, past_value = self.past
        key = scatter(past_key, self.key, self.write_index)
        value = scatter(past_value, self.value, self.write_index)
        self.present = (key, value)
        return masked_attention(query, key, value, self.mask, **settings)


class PortableTracer(Tracer):
    """Traces the portable form of a skeleton's engines."""

    soft_exits = False

    def head(self) -> TracedGraph:
        """x -> logits."""
        module = HeadModule(self.skeleton, self.interface)
        return trace(module, {"x": self.hidden()}, ["logits"], self.dynamic())

    def layer(self, index: int) -> TracedGraph:
        """x, contexts, mask, write_index and past -> y, present and stability."""
        past = self.past(index)
        tokens, length = self.hidden().shape[1], past["past_key_0"].shape[2]
        mask = stand_in([BATCH, 1, tokens, length], torch.bool)
        inputs = self.shared_inputs() | {MASK: mask} | self.write_index() | past
        dynamic = self.dynamic() | {MASK: {0: "batch", 2: "tokens", 3: "cache_length"}}
        module = PortableLayerModule(self.skeleton, self.interface, index, self.router)
        outputs = ["y", "present_key_0", "present_value_0", "stability"]
        graph = trace(module, inputs, outputs, dynamic)
        _slice_splits(graph.model.graph)
        if module.window > 0:
            _rename_input(graph.model.graph, MASK, f"{WINDOW_MASK}{module.window}")
        return graph

    def key_value(self, index: int) -> TracedGraph:
        """x, contexts, write_index and past -> present."""
        graph = super().key_value(index)
        _slice_splits(graph.model.graph)
        return graph


def _slice_splits(graph: onnx.GraphProto) -> None:
    """Take parts of a tensor by Slice: TensorRT knows no sequences, which torch splits into."""
    held = constants(graph)
    splits = {node.output[0]: node for node in graph.node if node.op_type == "SplitToSequence"}
    for node in graph.node:
        if node.op_type != "SequenceAt" or node.input[0] not in splits:
            continue
        split = splits[node.input[0]]
        axis = next(a.i for a in split.attribute if a.name == "axis")
        index, sizes = int(held[node.input[1]]), held[split.input[1]]
        start = index * int(sizes) if sizes.ndim == 0 else int(sizes[:index].sum())
        end = start + int(sizes if sizes.ndim == 0 else sizes[index])
        bounds = []
        for name, bound in (("start", start), ("end", end), ("axis", axis)):
            tensor = helper.make_tensor(f"{node.output[0]}_{name}", TensorProto.INT64, [1], [bound])
            graph.initializer.append(tensor)
            bounds.append(tensor.name)
        node.CopyFrom(helper.make_node("Slice", [split.input[0], *bounds], node.output))
    for split in splits.values():
        graph.node.remove(split)


def _rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    next(value for value in graph.input if value.name == old).name = new
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
