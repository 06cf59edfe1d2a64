"""Write graphs for devices into a bundle: their weights are those that it holds already."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.plan_entries import PortableContext, PortableGraphs, PortableLayers
from sedac_export.bundle.staging import sync
from sedac_export.errors import SedacError
from sedac_export.graph.block import compose
from sedac_export.graph.modules import Context
from sedac_export.graph.stamp import save_engine
from sedac_export.graph.trace import TracedGraph
from sedac_export.graph.trace_model import TracedGraphs

MASK = "mask"
WINDOW_MASK = "mask_window_"


# the graph, its weights pointed at what is stored, given by name
PointWeights = Callable[[TracedGraph, Mapping[str, TensorProto]], onnx.ModelProto]


def write_graphs(
    directory: Path,
    manifest: bundle.Manifest,
    graphs: TracedGraphs,
    prefix: str,
    point: PointWeights | None = None,
) -> PortableGraphs:
    """Write `graphs`, traced in the bundle's precision, as onnx/`prefix`_*.onnx.

    point: how graphs read weights that are stored in another form than they are traced with.
    Returns what the manifest says of them. Raises SedacError when the bundle in `directory` is of
    another model.
    """
    writer = _Writer(directory, manifest, graphs, prefix, point or _point_at_stored)
    interface = graphs.interface
    entry = PortableGraphs(
        embed=writer.save("embed", writer.engine(graphs.embed, manifest.engines.embed)),
        contexts_graph=writer.contexts(),
        layers=[writer.layers(entry) for entry in manifest.engines.layers],
        key_value=[writer.key_value(index) for index in range(len(graphs.kinds))],
        head=writer.save("head", writer.engine(graphs.head, manifest.engines.head)),
        contexts={
            context.name: _context(context, interface.batch)
            for context in interface.contexts
            if context.used
        },
        masks={name: window_of(name) for graph in graphs.layers for name in masks_of(graph.model)},
    )
    writer.flush()
    return entry


def masks_of(model: onnx.ModelProto) -> list[str]:
    """Names of the mask inputs of a layer's or a block's graph."""
    return [value.name for value in model.graph.input if value.name.startswith(MASK)]


def window_of(mask: str) -> int:
    """The positions that a layer with the mask input `mask` sees, 0 for all before it."""
    return int(mask.removeprefix(WINDOW_MASK)) if mask.startswith(WINDOW_MASK) else 0


def with_cache_length(model: onnx.ModelProto, length: int) -> onnx.ModelProto:
    """`model` for caches of exactly `length` positions, as TensorRT needs them."""
    for value in [*model.graph.input, *model.graph.output]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "cache_length":
                axis.dim_value = length
    return model


def _context(context: Context, batch: int) -> PortableContext:
    rows = -1 if 1 < batch == context.shape[0] else 1
    dtype = str(context.dtype).removeprefix("torch.")
    return PortableContext.model_validate({"dtype": dtype, "shape": [rows, -1, *context.shape[2:]]})


class _Writer:
    """Points graphs at the weights of a bundle's own engines, by their names there."""

    def __init__(
        self,
        directory: Path,
        manifest: bundle.Manifest,
        graphs: TracedGraphs,
        prefix: str,
        point: PointWeights,
    ) -> None:
        self.directory, self.manifest, self.graphs = directory, manifest, graphs
        self.prefix, self.point = prefix, point
        self.models: dict[str, onnx.ModelProto] = {}
        self.monolith = self._weights(manifest.engines.monolith.file)

    def engine(self, graph: TracedGraph, twin: str) -> onnx.ModelProto:
        """`graph` with the weights of the engine `twin`."""
        return self._point(graph, self._weights(twin), "")

    def contexts(self) -> str | None:
        """The contexts engine's graph, where there is one."""
        graph, twin = self.graphs.contexts, self.manifest.engines.contexts
        if graph is None or twin is None:
            return None
        return self.save("contexts", self.engine(graph, twin))

    def layers(self, entry: bundle.LayerEngineEntry) -> PortableLayers:
        """A layer engine's graph."""
        first, count = entry.first_layer, entry.num_layers
        models = [self._layer(index) for index in range(first, first + count)]
        model = compose(models)
        return PortableLayers(
            file=self.save(Path(entry.file).stem, model),
            first_layer=first,
            num_layers=count,
            masks=sorted({name for model in models for name in masks_of(model)}),
            stability=any(value.name == "stability" for value in model.graph.output),
        )

    def key_value(self, index: int) -> str:
        """A layer's kv engine's graph."""
        graph = self.graphs.key_value[self.graphs.kinds[index]]
        twin = self.manifest.engines.key_value[index].file
        return self.save(Path(twin).stem, self.engine(graph, twin))

    def save(self, name: str, model: onnx.ModelProto) -> str:
        """Take `model` for the engine `name`; its path in the bundle."""
        file = f"onnx/{self.prefix}_{name}.onnx"
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
        own = {
            name.removeprefix(prefix): stored
            for name, stored in weights.items()
            if name.startswith(prefix)
        }
        try:
            return self.point(graph, own)
        except WeightMismatch as error:
            raise SedacError(
                f"{self.directory} holds no weight {error}; name the model that the bundle was"
                " built from"
            ) from error

    def _weights(self, file: str) -> dict[str, TensorProto]:
        model = onnx.load(self.directory / file, load_external_data=False)
        return {item.name: item for item in model.graph.initializer if item.external_data}


class WeightMismatch(Exception):
    """A weight that a graph reads and the bundle does not hold: its name and shape."""


def check_held(initializer: TensorProto, shape: Sequence[int] | None) -> None:
    """Raise WeightMismatch unless `shape`, that of what is stored, is the initialiser's."""
    if shape is None or list(shape) != list(initializer.dims):
        raise WeightMismatch(f"{initializer.name} of shape {list(initializer.dims)}")


def _point_at_stored(graph: TracedGraph, weights: Mapping[str, TensorProto]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for initializer in model.graph.initializer:
        if initializer.name in graph.weights:
            stored = weights.get(initializer.name)
            check_held(initializer, stored and stored.dims)
            name = initializer.name
            initializer.CopyFrom(stored)
            initializer.name = name
    return model
