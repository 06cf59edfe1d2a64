"""Fill traced graphs with weights: write each weight once, point every graph at it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from sedac_export.arrays import Array, Floats
from sedac_export.graph.quantized_graph import (
    SCALES,
    ZERO_POINTS,
    Layout,
    weight_of_part,
)
from sedac_export.graph.trace import TracedGraph
from sedac_export.model.precision import stored
from sedac_export.model.quantization import (
    Quantization,
    QuantizedRows,
    quantize,
    quantize_calibrated,
)

# ONNX Runtime maps external data from page-aligned offsets without copying
ALIGNMENT = 4096

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


@dataclass(frozen=True)
class QuantizedStorage:
    """How the weights in `layouts` are quantized.

    squares: by weight, for those that are calibrated, what `quantize_calibrated` takes.
    """

    quantization: Quantization
    layouts: Mapping[str, Layout]
    squares: dict[str, Floats] = field(default_factory=dict)

    def rows(self, name: str, pieces: Iterator[torch.Tensor]) -> Iterator[QuantizedRows]:
        """The weight `name`, quantized some rows at a time."""
        squares = self.squares.get(name)
        if self.layouts[name] is Layout.COLUMNS:
            pieces = iter([torch.cat(list(pieces)).T])
        elif squares is not None:
            pieces = iter([torch.cat(list(pieces))])
        for piece in pieces:
            floats = stored(piece, "fp32", name).numpy()
            if squares is None:
                yield quantize(floats, self.quantization)
            else:
                yield quantize_calibrated(floats, squares, self.quantization)


@dataclass
class WeightStore:
    """Writes weights to data files in `directory`, each weight once.

    Those that `quantized` lists are quantized, the others stored in `precision`.
    """

    directory: Path
    precision: str
    quantized: QuantizedStorage | None = None
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
                if self.quantized is not None and name in self.quantized.layouts:
                    self._write_quantized(file, name, self.quantized.rows(name, read(name)))
                else:
                    pieces = (stored(piece, self.precision, name) for piece in read(name))
                    self._write(file, name, map(_bytes, pieces))

    def write_arrays(self, location: str, arrays: Mapping[str, Floats]) -> dict[str, Place]:
        """Write `arrays`, which are none of the model's weights, to the new file `location`."""
        if not arrays:
            return {}
        with (self.directory / location).open("xb") as file:
            return {name: _put(file, iter([array.data])) for name, array in arrays.items()}

    def dequantized(self, name: str, columns: int) -> Floats:
        """The quantized weight `name` as engines compute with it, of rows of `columns` weights."""
        assert self.quantized is not None
        quantization = self.quantized.quantization
        scales = self._read(f"{name}{SCALES}", np.float32)
        scales = scales.reshape(-1, quantization.blocks(columns))
        zeros = None
        if not quantization.symmetric:
            zeros = self._read(f"{name}{ZERO_POINTS}", np.uint8).reshape(len(scales), -1)
        values = self._read(name, np.uint8).reshape(*scales.shape, -1)
        rows = QuantizedRows(values, scales, zeros).dequantized(quantization, columns)
        return rows if self.quantized.layouts[name] is Layout.ROWS else rows.T

    def _read(self, name: str, kind: type[np.generic]) -> Array:
        place = self.places[name]
        count = place.length // np.dtype(kind).itemsize
        return np.fromfile(self.directory / place.location, kind, count, offset=place.offset)

    def _write_quantized(self, file: BinaryIO, name: str, rows: Iterator[QuantizedRows]) -> None:
        scales: list[memoryview] = []
        zeros: list[memoryview] = []

        def values() -> Iterator[memoryview]:
            for piece in rows:
                scales.append(piece.scales.data)
                if piece.zero_points is not None:
                    zeros.append(piece.zero_points.data)
                yield piece.values.data

        self._write(file, name, values())
        self._write(file, f"{name}{SCALES}", iter(scales))
        if zeros:
            self._write(file, f"{name}{ZERO_POINTS}", iter(zeros))

    def _write(self, file: BinaryIO, name: str, chunks: Iterator[memoryview]) -> None:
        self.places[name] = _put(file, chunks)


def _put(file: BinaryIO, chunks: Iterator[memoryview]) -> Place:
    """Append `chunks` to `file`, where ONNX Runtime can map them."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    start = file.tell()
    for chunk in chunks:
        file.write(chunk)
    return Place(Path(file.name).name, start, file.tell() - start)


def _bytes(tensor: torch.Tensor) -> memoryview:
    numbers: Array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return numbers.data


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
            weight, part = weight_of_part(initializer.name)
            point(initializer, store.places[sources[weight] + part])
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
