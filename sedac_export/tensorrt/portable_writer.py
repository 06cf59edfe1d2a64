"""Add the portable graphs to a bundle: their weights are those that it holds already."""

from pathlib import Path

import onnx
import torch
from onnx import TensorProto

from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.plan_entries import PortableContext, PortableGraphs, PortableLayers
from sedac_export.bundle.staging import sync
from sedac_export.console import StageProgress
from sedac_export.errors import SedacError
from sedac_export.graph.block import compose
from sedac_export.graph.modules import Context
from sedac_export.graph.stamp import save_engine
from sedac_export.graph.trace import TracedGraph
from sedac_export.graph.trace_model import TracedGraphs, trace_graphs
from sedac_export.model.skeleton import Skeleton
from sedac_export.tensorrt.portable import (
    BATCH,
    PortableTracer,
    masks_of,
    window_of,
    with_cache_length,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_portable_graphs(
    directory: Path, manifest: bundle.Manifest, skeleton: Skeleton, progress: StageProgress
) -> bundle.Manifest:
    """Trace `skeleton` in the bundle's precision and write the graphs; the manifest with them.

    Raises SedacError when the bundle in `directory` is of another model.
    """
    with torch.no_grad():
        dtype = DTYPES[manifest.precision]
        graphs = trace_graphs(skeleton, progress, PortableTracer, dtype, BATCH)
    writer = _Writer(directory, manifest, graphs)
    portable = PortableGraphs(
        embed=writer.save("embed", writer.engine(graphs.embed, manifest.engines.embed)),
        contexts_graph=writer.contexts(),
        layers=[writer.layers(entry) for entry in manifest.engines.layers],
        key_value=[writer.key_value(index) for index in range(len(graphs.kinds))],
        head=writer.save("head", writer.engine(graphs.head, manifest.engines.head)),
        contexts={
            context.name: _context(context) for context in graphs.interface.contexts if context.used
        },
        masks={name: window_of(name) for graph in graphs.layers for name in masks_of(graph.model)},
    )
    writer.flush()
    files = manifest.files | {name: bundle.file_entry(directory, name) for name in portable.files()}
    whole = manifest.model_copy(update={"portable": portable, "files": files})
    bundle.write_manifest(directory, whole)
    return whole


def _context(context: Context) -> PortableContext:
    rows = -1 if context.shape[0] == BATCH else 1
    dtype = str(context.dtype).removeprefix("torch.")
    return PortableContext.model_validate({"dtype": dtype, "shape": [rows, -1, *context.shape[2:]]})


class _Writer:
    """Points portable graphs at the weights of a bundle's own engines, by their names there."""

    def __init__(self, directory: Path, manifest: bundle.Manifest, graphs: TracedGraphs) -> None:
        self.directory, self.manifest, self.graphs = directory, manifest, graphs
        self.models: dict[str, onnx.ModelProto] = {}
        if len(graphs.kinds) != manifest.model.num_layers:
            raise SedacError(
                f"{directory} has {manifest.model.num_layers} layers and the model"
                f" {len(graphs.kinds)}; name the model that the bundle was built from"
            )
        self.monolith = self._weights(manifest.engines.monolith.file)

    def engine(self, graph: TracedGraph, twin: str) -> onnx.ModelProto:
        """`graph` with the weights of the engine `twin`."""
        return self._point(graph, self._weights(twin), "")

    def contexts(self) -> str | None:
        """The portable form of the contexts engine, where there is one."""
        graph, twin = self.graphs.contexts, self.manifest.engines.contexts
        if graph is None or twin is None:
            return None
        return self.save("contexts", self.engine(graph, twin))

    def layers(self, entry: bundle.LayerEngineEntry) -> PortableLayers:
        """The portable form of a layer engine."""
        first, count = entry.first_layer, entry.num_layers
        models = [self._layer(index) for index in range(first, first + count)]
        file = self.save(Path(entry.file).stem, compose(models))
        masks = sorted({name for model in models for name in masks_of(model)})
        return PortableLayers(file=file, first_layer=first, num_layers=count, masks=masks)

    def key_value(self, index: int) -> str:
        """The portable form of a layer's kv engine."""
        graph = self.graphs.key_value[self.graphs.kinds[index]]
        twin = self.manifest.engines.key_value[index].file
        return self.save(Path(twin).stem, self.engine(graph, twin))

    def save(self, name: str, model: onnx.ModelProto) -> str:
        """Take `model` for onnx/portable_`name`.onnx; its path in the bundle."""
        file = f"onnx/portable_{name}.onnx"
        self.models[file] = with_cache_length(model, self.manifest.max_cache_length)
        return file

    def flush(self) -> None:
        """Write what was taken, once nothing can be wrong with the model any more."""
        for file, model in self.models.items():
            save_engine(model, self.directory / file)
            sync(self.directory / file)

    def _layer(self, index: int) -> onnx.ModelProto:
        graph = self.graphs.layers[self.graphs.kinds[index]]
        # a monolith of one layer is that layer's graph, its names unchanged
        prefix = f"layer_{index}." if len(self.graphs.kinds) > 1 else ""
        return self._point(graph, self.monolith, prefix)

    def _point(
        self, graph: TracedGraph, weights: dict[str, TensorProto], prefix: str
    ) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        for initializer in model.graph.initializer:
            if initializer.name not in graph.weights:
                continue
            stored = weights.get(prefix + initializer.name)
            if stored is None or stored.dims != initializer.dims:
                raise SedacError(
                    f"{self.directory} holds no weight {initializer.name} of shape"
                    f" {list(initializer.dims)}; name the model that the bundle was built from"
                )
            name = initializer.name
            initializer.CopyFrom(stored)
            initializer.name = name
        return model

    def _weights(self, file: str) -> dict[str, TensorProto]:
        model = onnx.load(self.directory / file, load_external_data=False)
        return {item.name: item for item in model.graph.initializer if item.external_data}
