"""Portable graphs of int4 bundles: TensorRT reads blocks of 4 bits by DequantizeLinear.

It takes signed numbers without zero points, and computes in fp16. What the bundle holds for CPUs
has another form, so these graphs have weights of their own, in onnx/portable.data.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from sedac_export.arrays import Array
from sedac_export.device_graphs.graph_writer import check_held
from sedac_export.errors import SedacError
from sedac_export.graph.quantized_graph import SCALES, Layout, layouts
from sedac_export.graph.stamp import ALIGNMENT, Place, point
from sedac_export.graph.trace import TracedGraph
from sedac_export.model.quantization import Quantization, QuantizedRows, transposed

DATA = "portable.data"


class DequantizedWeights:
    """Points graphs traced in fp16 at weights in `file`, which is written as they are asked for.

    directory: where the bundle's own weights are.
    """

    def __init__(self, directory: Path, file: BinaryIO, quantization: Quantization) -> None:
        self.directory, self.file, self.quantization = directory, file, quantization
        self.places: dict[tuple[str, str], Place] = {}

    def __call__(self, graph: TracedGraph, weights: Mapping[str, TensorProto]) -> onnx.ModelProto:
        """`graph` with its weights: products with blocks of 4 bits, all else in fp16.

        Raises WeightMismatch for a weight that is not held, SedacError for rows that are no whole
        blocks.
        """
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        ways = layouts(graph)
        for initializer in list(model.graph.initializer):
            if initializer.name not in graph.weights:
                continue
            stored = weights.get(initializer.name)
            scales = weights.get(f"{initializer.name}{SCALES}")
            if stored is None or scales is None:
                check_held(initializer, stored and stored.dims)
                assert stored is not None
                self._put(initializer, stored, "fp16", partial(self._read, stored))
                continue
            rows, layout = self._rows(stored, scales), ways[initializer.name]
            assert layout is not None
            self._check(initializer, rows, layout)
            if _is_gathered(model.graph, initializer.name):
                whole = partial(rows.dequantized, self.quantization, initializer.dims[1])
                self._put(initializer, stored, "rows", whole)
            else:
                self._dequantize(model.graph, initializer, stored, rows, layout)
        return model

    def _dequantize(
        self,
        graph: onnx.GraphProto,
        initializer: TensorProto,
        stored: TensorProto,
        rows: QuantizedRows,
        layout: Layout,
    ) -> None:
        """Have `graph` multiply with what DequantizeLinear makes of the weight."""
        weight, axis = f"{initializer.name}.dequantized", 1 - layout.value
        for node in graph.node:
            node.input[:] = [weight if name == initializer.name else name for name in node.input]
        scales = graph.initializer.add(name=f"{initializer.name}{SCALES}")
        scales.dims[:] = _laid(rows.scales, layout).shape
        self._put(scales, stored, "scales", partial(_laid, rows.scales, layout))
        node = helper.make_node(
            "DequantizeLinear",
            [initializer.name, scales.name],
            [weight],
            name=f"{initializer.name}.dequantize",
            axis=axis,
            block_size=self.quantization.block_size,
        )
        graph.node.insert(0, node)
        initializer.data_type = TensorProto.INT4
        self._point(initializer, stored, "blocks", partial(_signed, rows, layout))

    def _put(
        self, initializer: TensorProto, stored: TensorProto, form: str, make: Callable[[], Array]
    ) -> None:
        initializer.data_type = TensorProto.FLOAT16
        self._point(initializer, stored, form, lambda: _halves(make(), initializer.name))

    def _point(
        self, initializer: TensorProto, stored: TensorProto, form: str, make: Callable[[], Array]
    ) -> None:
        """Point `initializer` at what `make` gives, written once for each `stored` and `form`."""
        place = _place(stored)
        key = f"{place['location']} {place['offset']}", form
        if key not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
            start = self.file.tell()
            self.file.write(np.ascontiguousarray(make()).data)
            self.places[key] = Place(DATA, start, self.file.tell() - start)
        point(initializer, self.places[key])

    def _rows(self, stored: TensorProto, scales: TensorProto) -> QuantizedRows:
        floats = self._read(scales)
        return QuantizedRows(self._read(stored).reshape(*floats.shape, -1), floats, None)

    def _check(self, initializer: TensorProto, rows: QuantizedRows, layout: Layout) -> None:
        columns = initializer.dims[1 - layout.value]
        if self.quantization.blocks(columns) * self.quantization.block_size != columns:
            raise SedacError(
                f"{initializer.name} has rows of {columns} numbers, which are no whole blocks of"
                f" {self.quantization.block_size}, and TensorRT takes no others; choose a"
                f" --block-size that divides {columns}"
            )
        shape = [len(rows.scales), columns]
        check_held(initializer, shape if layout is Layout.ROWS else shape[::-1])

    def _read(self, stored: TensorProto) -> Array:
        place = _place(stored)
        kind = helper.tensor_dtype_to_np_dtype(stored.data_type)
        return np.memmap(
            self.directory / place["location"],
            dtype=kind,
            mode="r",
            offset=int(place["offset"]),
            shape=tuple(stored.dims),
        )


def _halves(numbers: Array, name: str) -> Array:
    with np.errstate(over="ignore"):
        halves: Array = numbers.astype(np.float16)
    if not np.isfinite(halves).all():
        raise SedacError(
            f"{name} has numbers beyond the range of fp16, in which TensorRT computes; leave the"
            " target out"
        )
    return halves


def _signed(rows: QuantizedRows, layout: Layout) -> Array:
    """The numbers of `rows` less 8, packed as ONNX does: the lower half of a byte first."""
    packed = rows.values ^ 0x88
    return packed if layout is Layout.ROWS else transposed(packed)


def _laid(scales: Array, layout: Layout) -> Array:
    return scales if layout is Layout.ROWS else scales.T


def _is_gathered(graph: onnx.GraphProto, weight: str) -> bool:
    return any(node.op_type == "Gather" and node.input[0] == weight for node in graph.node)


def _place(stored: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in stored.external_data}
