"""Run a bundle's portable graphs in ONNX Runtime."""

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sedac_export.arrays import Array
from sedac_export.bundle.manifest import Precision
from sedac_export.bundle.sessions import CPU, Engine


class PortableRunner:
    """Runs graphs for devices in ONNX Runtime. On the CPU, bf16, which it has no kernels for there,
    is fp32.
    """

    def __init__(self, directory: Path, precision: Precision, provider: str = CPU) -> None:
        self.directory, self.precision, self.provider = directory, precision, provider
        # the precision that its outputs have
        wide = precision == "bf16" and provider == CPU
        self.computes: Precision = "fp32" if wide else precision
        self._engine = functools.lru_cache(maxsize=2)(self._load)

    def __call__(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Outputs of `graph`, floats as fp32."""
        engine = self._engine(graph)
        inputs = engine.session.get_inputs()
        half = {value.name for value in inputs if value.type == "tensor(float16)"}
        given = {name: x.astype(np.float16) if name in half else x for name, x in feeds.items()}
        outputs = engine.run(given)
        return {
            name: x.astype(np.float32) if x.dtype == np.float16 else x
            for name, x in outputs.items()
        }

    def _load(self, graph: str) -> Engine:
        path = self.directory / graph
        if self.precision == self.computes:
            return self._engine_of(path)
        model = onnx.load(path, load_external_data=False)
        for initializer in model.graph.initializer:
            _bring_in(initializer, path.parent)
        _widen(model.graph)
        with tempfile.TemporaryDirectory() as place:
            wide = Path(place) / "wide.onnx"
            onnx.save(model, wide, save_as_external_data=True)
            return self._engine_of(wide)

    def _engine_of(self, path: Path) -> Engine:
        return Engine(path, os.cpu_count() or 1, optimized=False, provider=self.provider)


def _bring_in(tensor: TensorProto, directory: Path) -> None:
    """Read what `tensor` holds in a file, also in one that a copy of a bundle links to."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place:
        with (directory / Path(place["location"]).name).open("rb") as file:
            file.seek(int(place.get("offset", 0)))
            tensor.raw_data = file.read(int(place["length"]))
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT


def _widen(graph: onnx.GraphProto) -> None:
    """Make every bf16 tensor of `graph` fp32."""
    narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == narrow:
                attribute.i = wide
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
    for initializer in graph.initializer:
        _widen_tensor(initializer)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
