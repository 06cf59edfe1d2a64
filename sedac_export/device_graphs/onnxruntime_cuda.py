"""Add the graphs for ONNX Runtime's CUDA provider to a bundle.

They are the bundle's own engines in its own precision. The engines for CPUs compute in fp32, for
which the provider has no kernel of GroupQueryAttention.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sedac_export.bundle import Bundle
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.edit import edited_bundle
from sedac_export.bundle.plan_entries import PortableGraphs
from sedac_export.bundle.staging import claimed
from sedac_export.console import StageProgress
from sedac_export.device_graphs.graph_writer import write_graphs
from sedac_export.device_graphs.same_model import check_facts, check_graphs
from sedac_export.errors import SedacError
from sedac_export.graph.constants import constants
from sedac_export.graph.trace import TracedGraph, Tracer
from sedac_export.graph.trace_model import trace_graphs
from sedac_export.model.precision import DTYPES
from sedac_export.model.skeleton import Skeleton
from sedac_export.model.source import opened_model

TARGET = "onnxruntime-cuda"
PREFIX = "cuda"


class CudaTracer(Tracer):
    """Traces the form of a skeleton's engines that the CUDA provider has kernels for."""

    soft_exits = False

    def layer(self, index: int) -> TracedGraph:
        """As for CPUs."""
        return _with_kernels(super().layer(index))

    def key_value(self, index: int) -> TracedGraph:
        """As for CPUs."""
        return _with_kernels(super().key_value(index))


def check_precision(precision: bundle.Precision) -> None:
    """Raise SedacError when weights are not of 16 bits."""
    if precision not in ("fp16", "bf16"):
        raise SedacError(
            f"--target {TARGET} takes fp16 or bf16 weights, and these are {precision}; build with"
            " --precision fp16"
        )


def add_onnxruntime_cuda(
    directory: Path,
    model: str | None = None,
    progress: StageProgress = lambda *_: None,
    just_built: bool = False,
) -> PortableGraphs:
    """Trace `model` and write the graphs into the bundle in `directory`.

    model: a directory, a GGUF file or a hub id, whose configuration is read; the weights are those
    of the bundle. just_built: the bundle was built from it just now. Raises SedacError.
    """
    with claimed(directory) as claim:
        bundle.settle_manifest(directory)
        opened = Bundle.open(directory)
        manifest = opened.manifest
        check_precision(manifest.precision)
        if model is None:
            raise SedacError(
                f"{directory} does not say how its layers are made; name the model with --model"
            )
        with opened_model(model, claim.scratch) as source, torch.no_grad():
            skeleton = Skeleton.load(source.directory)
            check_facts(directory, manifest.model, model, skeleton)
            graphs = trace_graphs(skeleton, progress, CudaTracer, DTYPES[manifest.precision])
        if manifest.layers_per_engine == 1:
            # the host has both residual streams, and some 14 kernels a layer are not launched
            layers = [without_stability(graph) for graph in graphs.layers]
            graphs = replace(graphs, layers=layers)
        with edited_bundle(opened) as copy:
            entry = write_graphs(copy, manifest, graphs, PREFIX)
            if not just_built:
                check_graphs(copy, manifest, entry, directory, model)
            files = {name: bundle.file_entry(copy, name) for name in entry.files()}
            update = {"onnxruntime_cuda": entry, "files": manifest.files | files}
            bundle.write_manifest(copy, manifest.model_copy(update=update))
    return entry


def without_stability(graph: TracedGraph) -> TracedGraph:
    """A layer's graph that leaves it to the host how much the layer changes the residual stream."""
    model = ir.from_proto(graph.model)
    outputs = model.graph.outputs
    kept = [value for value in outputs if value.name != "stability"]
    outputs.clear()
    outputs.extend(kept)
    RemoveUnusedNodesPass()(model)
    return graph.of_part(ir.to_proto(model))


def _with_kernels(graph: TracedGraph) -> TracedGraph:
    """`graph` in operators that the provider has, or fuses."""
    _split_tensors(graph.model.graph)
    for node in graph.model.graph.node:
        # ONNX Runtime's older name of it: what it fuses residual additions into knows only that
        if node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"
    return graph


def _split_tensors(graph: onnx.GraphProto) -> None:
    """Split into tensors by Split, not into sequences of them, which only the CPU does."""
    held = constants(graph)
    taken: dict[str, dict[int, onnx.NodeProto]] = defaultdict(dict)
    for node in graph.node:
        if node.op_type == "SequenceAt":
            taken[node.input[0]][int(held[node.input[1]])] = node
    for node in [node for node in graph.node if node.op_type == "SplitToSequence"]:
        sequence, sizes = node.output[0], held[node.input[1]]
        if sizes.ndim == 0:
            # equal parts; were there more than are taken, their sum would not be the axis
            sizes = sizes.repeat(max(taken[sequence]) + 1)
        parts = [f"{sequence}_{index}" for index in range(len(sizes))]
        for index, user in taken[sequence].items():
            parts[index] = user.output[0]
            graph.node.remove(user)
        tensor = helper.make_tensor(f"{sequence}_sizes", TensorProto.INT64, [len(sizes)], sizes)
        graph.initializer.append(tensor)
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        split = helper.make_node("Split", [node.input[0], tensor.name], parts, axis=axis)
        node.CopyFrom(split)
