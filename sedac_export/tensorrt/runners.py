"""Run engines for the comparison: portable graphs in ONNX Runtime, plans on a GPU."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from sedac_export.arrays import Array
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.plan_entries import PlanSet, PortableGraphs
from sedac_export.bundle.sessions import open_session
from sedac_export.tensorrt.agreement import run_session
from sedac_export.tensorrt.profiles import most_tokens
from sedac_export.tensorrt.worker import Worker

_HALF = "tensor(float16)"


class PortableRunner:
    """Runs portable graphs in ONNX Runtime. Their bf16, which it has no kernels for, as fp32."""

    def __init__(self, directory: Path, precision: bundle.Precision) -> None:
        self.directory, self.precision = directory, precision
        # the precision that its outputs have
        self.computes: bundle.Precision = "fp32" if precision == "bf16" else precision
        self._session = functools.lru_cache(maxsize=2)(self._open)

    def __call__(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Outputs of `graph`, floats as fp32."""
        engine = self._session(graph)
        half = {value.name for value in engine.get_inputs() if value.type == _HALF}
        given = {name: x.astype(np.float16) if name in half else x for name, x in feeds.items()}
        outputs = run_session(engine, given)
        return {
            name: x.astype(np.float32) if x.dtype == np.float16 else x
            for name, x in outputs.items()
        }

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        path = self.directory / graph
        if self.precision != "bf16":
            return open_session(path)
        model = onnx.load(path)
        _widen(model.graph)
        with tempfile.TemporaryDirectory() as place:
            wide = Path(place) / "wide.onnx"
            onnx.save(model, wide, save_as_external_data=True)
            return open_session(wide)


class GpuPlanRunner:
    """Runs a target's plans on the GPU."""

    def __init__(
        self, directory: Path, portable: PortableGraphs, plans: PlanSet, length: int, worker: Worker
    ) -> None:
        self.directory, self.portable, self.worker = directory, portable, worker
        self.plans = {plan.graph: plan for plan in plans.plans}
        self.options, self.length = plans.options, length

    def __call__(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Outputs of the plan of `graph`, floats as fp32, in the first profile that fits."""
        tokens = next(iter(feeds.values())).shape[1]
        most = most_tokens(self.options, self.length, head=graph == self.portable.head)
        profile = next(index for index, count in enumerate(most) if tokens <= count)
        known = {
            value.name
            for value in onnx.load(self.directory / graph, load_external_data=False).graph.input
        }
        with tempfile.TemporaryDirectory() as place:
            given, results = Path(place) / "feeds.npz", Path(place) / "results.npz"
            np.savez(given, allow_pickle=False, **{n: x for n, x in feeds.items() if n in known})
            self.worker.call(
                "run",
                plan=str(self.directory / self.plans[graph].file),
                profile=profile,
                feeds=str(given),
                results=str(results),
            )
            with np.load(results) as arrays:
                return dict(arrays)


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
