"""Fill traced graphs with weights: write each weight once, point every graph at it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from sedac_export.graph.trace import TracedGraph
from sedac_export.model.precision import stored

# ONNX Runtime maps external data from page-aligned offsets without copying
_ALIGNMENT = 4096

WeightReader = Callable[[str], Iterator[torch.Tensor]]

_DATA_TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Place:
    """Where a weight lies in the bundle's external data."""

    location: str
    offset: int
    length: int


@dataclass
class WeightStore:
    """Writes weights in `precision` to data files in `directory`, each weight once."""

    directory: Path
    precision: str
    places: dict[str, Place] = field(default_factory=dict)

    def write(self, location: str, names: Iterable[str], read: WeightReader) -> None:
        """Write those weights of `names` that have no place yet to the new file `location`.

        read gives a weight's rows some at a time. Raises SedacError when a weight overflows the
        precision.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self.places]
        if not missing:
            return
        with (self.directory / location).open("xb") as file:
            for name in missing:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                start = file.tell()
                for piece in read(name):
                    rows = stored(piece, self.precision, name).contiguous()
                    file.write(rows.reshape(-1).view(torch.uint8).numpy().data)
                self.places[name] = Place(location, start, file.tell() - start)


def with_precision(graph: TracedGraph, precision: str) -> TracedGraph:
    """`graph` with weights stored in `precision` and cast to fp32 where they are used.

    ONNX Runtime folds the casts when it loads the engine; a table that is only gathered from is
    cast after the gather, so that it stays small in memory too.
    """
    if precision == "fp32":
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for initializer in model.graph.initializer:
        if initializer.name in graph.weights:
            initializer.data_type = _DATA_TYPES[precision]
            _cast_uses(model.graph, initializer.name)
    return TracedGraph(model, graph.weights)


def _cast_uses(graph: onnx.GraphProto, weight: str) -> None:
    users = [node for node in graph.node if weight in node.input]
    if all(node.op_type == "Gather" for node in users):
        for node in users:
            gathered = f"{node.output[0]}_stored"
            cast = helper.make_node("Cast", [gathered], [node.output[0]], to=TensorProto.FLOAT)
            node.output[0] = gathered
            graph.node.insert(list(graph.node).index(node) + 1, cast)
        return
    used = f"{weight}_fp32"
    for node in users:
        for position, name in enumerate(node.input):
            if name == weight:
                node.input[position] = used
    graph.node.insert(0, helper.make_node("Cast", [weight], [used], to=TensorProto.FLOAT))


def stamp(graph: TracedGraph, sources: dict[str, str], store: WeightStore) -> onnx.ModelProto:
    """A copy of `graph` that reads its weights from `store`.

    sources: initialiser name -> name under which the weight was stored.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for initializer in model.graph.initializer:
        if initializer.name in graph.weights:
            point(initializer, store.places[sources[initializer.name]])
    return model


def point(initializer: TensorProto, place: Place) -> None:
    """Make `initializer` an external tensor at `place`."""
    initializer.ClearField("raw_data")
    initializer.data_location = TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (
        ("location", place.location),
        ("offset", place.offset),
        ("length", place.length),
    ):
        initializer.external_data.add(key=key, value=str(value))


def save_engine(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` to `path` under the file's name, by which the runtime identifies engines."""
    model.graph.name = path.stem
    onnx.save(model, path)
