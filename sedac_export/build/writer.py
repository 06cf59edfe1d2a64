"""Write a bundle's engines: each weight once, and graphs that point at it."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from sedac_export.build.calibration import Calibration
from sedac_export.build.quantized_weights import weight_sources
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.sessions import Engine
from sedac_export.console import StageProgress
from sedac_export.graph.block import compose
from sedac_export.graph.fusion import fused
from sedac_export.graph.modules import Context
from sedac_export.graph.packed_attention import rotary_contexts
from sedac_export.graph.quantized_graph import quantized_graph
from sedac_export.graph.stamp import (
    QuantizedStorage,
    WeightStore,
    save_engine,
    stamp,
    with_precision,
)
from sedac_export.graph.trace import TracedGraph
from sedac_export.graph.trace_model import TracedGraphs
from sedac_export.model.precision import loses_digits, stored
from sedac_export.model.skeleton import Skeleton


class EngineWriter:
    """Writes engines of one bundle: weights first, each once, then graphs that point at them."""

    def __init__(
        self, skeleton: Skeleton, staging: Path, precision: str, quantized: QuantizedStorage | None
    ) -> None:
        self.skeleton, self.precision = skeleton, precision
        self.directory = staging / "onnx"
        self.directory.mkdir()
        self.store = WeightStore(self.directory, precision, quantized)
        self.tables: dict[str, ir.ExternalTensor] = {}
        self.faint: set[str] = set()

    def stamp(self, graph: TracedGraph, name: str, prefix: str = "") -> onnx.ModelProto:
        """`graph` with the weights below the model's `prefix`, stored in `name`.data if new."""
        sources = weight_sources(self.skeleton, graph, prefix)
        self.store.write(f"{name}.data", sources.values(), self.skeleton.checkpoint.pieces)
        return stamp(self._stored(graph, sources), sources, self.store)

    def _stored(self, graph: TracedGraph, sources: dict[str, str]) -> TracedGraph:
        """`graph` with its weights as the bundle stores them."""
        quantized = self.store.quantized
        if quantized is None:
            return with_precision(graph, self.precision)
        layouts = {
            initializer: quantized.layouts[source]
            for initializer, source in sources.items()
            if source in quantized.layouts
        }
        return quantized_graph(graph, layouts, quantized.quantization)

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The model's weight `name` as engines compute with it, like `weight`, the original."""
        source, quantized = self.skeleton.sources.names[name], self.store.quantized
        if quantized is None or source not in quantized.layouts:
            rounded = stored(weight, self.precision, name).to(weight.dtype)
            if loses_digits(rounded, weight):
                self.faint.add(source)
            return rounded
        columns = weight.shape[1 - quantized.layouts[source].value]
        return torch.from_numpy(self.store.dequantized(source, columns))

    def faint_note(self) -> str | None:
        """Which weights `rounded` has found to be too small for the precision."""
        if not self.faint:
            return None
        first, *others = sorted(self.faint)
        named = f"{first} and {len(others)} more" if others else first
        return (
            f"warning: {self.precision} has few digits for numbers as small as those of {named},"
            " and tokens may differ from the model's; --precision bf16 and fp32 keep them"
        )

    def fuse(self, layer: onnx.ModelProto) -> onnx.ModelProto:
        """`layer`, which has been stamped, with merged operators."""
        return fused(layer, self.tables)

    def write_tables(self, contexts: str, names: set[str], positions: int) -> None:
        """Write what the engine `contexts` gives of `names` at the first `positions`, for `fuse`.

        Attention rotates by rows of these, fp32 [positions, numbers].
        """
        ids = np.arange(positions, dtype=np.int64)[None]
        rows = Engine(self.directory.parent / contexts).run({"position_ids": ids})
        tables = {n: rows[n][0] for n in sorted(names & rows.keys())}
        for name, place in self.store.write_arrays("rotary.data", tables).items():
            self.tables[name] = ir.ExternalTensor(
                place.location,
                place.offset,
                place.length,
                ir.DataType.FLOAT,
                shape=ir.Shape(tables[name].shape),
                name=f"{name}_table",
            )

    def engine(self, graph: TracedGraph, name: str) -> str:
        """Write the engine `name`, which belongs to no layer, and its weights; its path."""
        return self.save(self.stamp(graph, name), name)

    def save(self, model: onnx.ModelProto, name: str) -> str:
        """Write `model` as onnx/`name`.onnx; its path in the bundle."""
        save_engine(model, self.directory / f"{name}.onnx")
        return f"onnx/{name}.onnx"

    def save_layers(
        self, layers: list[onnx.ModelProto], first: int, name: str
    ) -> bundle.LayerEngineEntry:
        """Write consecutive layers from `first` on as one engine."""
        model = compose(layers)
        return bundle.LayerEngineEntry(
            file=self.save(model, name),
            first_layer=first,
            num_layers=len(layers),
            contexts=_contexts(model),
        )


def write_engines(
    writer: EngineWriter,
    graphs: TracedGraphs,
    layers_per_engine: int,
    cache_length: int,
    calibration: Calibration | None,
    progress: StageProgress,
) -> dict[str, Any]:
    """Write every engine by `writer`; the fields of the manifest that are about them."""
    embed = writer.engine(graphs.embed, "embed")
    contexts = None if graphs.contexts is None else writer.engine(graphs.contexts, "contexts")
    if contexts is not None:
        rotary = rotary_contexts(graph.model for graph in graphs.layers)
        writer.write_tables(contexts, rotary, cache_length)
    if calibration is not None:
        root = writer.directory.parent
        calibration.begin(root / embed, None if contexts is None else root / contexts)
    layers, key_value = _write_layers(writer, graphs, calibration, progress)
    attention = _stamp_attention(writer, graphs)
    engines = bundle.EngineFiles(
        embed=embed,
        contexts=contexts,
        layers=_write_blocks(writer, layers, layers_per_engine, "layer", "block"),
        key_value=key_value,
        head=writer.engine(graphs.head, "head"),
        monolith=writer.save_layers(layers, 0, "monolith"),
        attention=_write_blocks(writer, attention, layers_per_engine, "attention", "attention"),
    )
    heads = graphs.interface.heads
    read, skeleton = writer.store.places.keys(), writer.skeleton
    return {
        "layers_per_engine": layers_per_engine,
        "key_value_heads": [bundle.KeyValueHeads(heads=h.count, head_size=h.size) for h in heads],
        "contexts": [_context(context) for context in graphs.interface.contexts if context.used],
        "engines": engines,
        "unread_tensors": skeleton.sources.unread(skeleton.checkpoint, read),
        "tool_versions": _tool_versions(),
    }


def _write_layers(
    writer: EngineWriter,
    graphs: TracedGraphs,
    calibration: Calibration | None,
    progress: StageProgress,
) -> tuple[list[onnx.ModelProto], list[bundle.KeyValueEngineEntry]]:
    """Write each layer's weights and kv engine; the layers' graphs and the kv engines' entries."""
    stamped, entries = [], []
    progress("write", 0, len(graphs.kinds))
    for index, kind in enumerate(graphs.kinds):
        name, prefix = f"layer_{index:03}", f"{writer.skeleton.layers_path}.{index}."
        if calibration is None:
            layer = writer.stamp(graphs.layers[kind], name, prefix)
        else:
            layer = _stamp_calibrated(writer, graphs.layers[kind], index, calibration)
        stamped.append(writer.fuse(layer))
        fill = writer.stamp(graphs.key_value[kind], name, prefix)
        file = writer.save(fill, f"kv_{index:03}")
        entries.append(bundle.KeyValueEngineEntry(file=file, contexts=_contexts(fill)))
        progress("write", index + 1, len(graphs.kinds))
    return stamped, entries


def _stamp_calibrated(
    writer: EngineWriter, graph: TracedGraph, index: int, calibration: Calibration
) -> onnx.ModelProto:
    """`graph`, that of the layer `index`, with weights that are quantized for the texts."""
    prefix = f"{writer.skeleton.layers_path}.{index}."
    sources = weight_sources(writer.skeleton, graph, prefix)
    assert writer.store.quantized is not None
    writer.store.quantized.squares.clear()
    writer.store.quantized.squares.update(calibration.observe(graph, sources, index))
    layer = writer.stamp(graph, f"layer_{index:03}", prefix)
    calibration.advance(layer, index, writer.directory)
    return layer


def _stamp_attention(writer: EngineWriter, graphs: TracedGraphs) -> list[onnx.ModelProto]:
    """Each layer's graph without its MLP; the weights are the layer's, written before."""
    path = writer.skeleton.layers_path
    return [
        writer.fuse(writer.stamp(graphs.attention[kind], f"layer_{index:03}", f"{path}.{index}."))
        for index, kind in enumerate(graphs.kinds)
    ]


def _write_blocks(
    writer: EngineWriter, layers: list[onnx.ModelProto], size: int, one: str, several: str
) -> list[bundle.LayerEngineEntry]:
    """Write engines of `size` layers, files named `one` or `several` and the layers."""
    entries = []
    for first in range(0, len(layers), size):
        block = layers[first : first + size]
        last = first + len(block) - 1
        name = f"{one}_{first:03}" if len(block) == 1 else f"{several}_{first:03}_{last:03}"
        entries.append(writer.save_layers(block, first, name))
    return entries


def _contexts(model: onnx.ModelProto) -> list[str]:
    return [v.name for v in model.graph.input if v.name.startswith("context_")]


def _context(context: Context) -> bundle.ContextTensor:
    return bundle.ContextTensor(
        name=context.name,
        shape=[-1 if axis == 1 else size for axis, size in enumerate(context.shape)],
        dtype=str(context.dtype).removeprefix("torch."),
    )


def _tool_versions() -> dict[str, str]:
    names = ("sedac", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in names}
