"""TensorRT's place taken by ONNX Runtime: plans run as the portable graphs they are built from."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.plan_entries import BuildOptions, PlanEntry, PlanSet
from sedac_export.bundle.sessions import Engine
from sedac_export.model.skeleton import Skeleton
from sedac_export.tensorrt.portable_writer import add_portable_graphs
from sedac_runtime import SedacModel, _core
from sedac_runtime.flavour import Device, Target
from sedac_runtime.library import find_onnxruntime

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Rehearsal:
    """An executor that runs plans at once, on the host.

    `calls` counts plans by replayed, `runs` by the name of their graph.
    """

    device: Device = "host"

    def __init__(self, directory: Path, target: Target) -> None:
        plans = json.loads((directory / "bundle.json").read_text())["plans"][target]["plans"]
        self.target = target
        self.graphs = {directory / plan["file"]: directory / plan["graph"] for plan in plans}
        self.sessions: dict[Path, onnxruntime.InferenceSession] = {}
        self.calls = {True: 0, False: 0}
        self.runs: Counter[str] = Counter()

    def __call__(
        self, plan: Path, tensors: list[_core.PlanTensor], stream: int, replayed: bool
    ) -> None:
        assert stream == 0
        self.calls[replayed] += 1
        self.runs[self.graphs[plan].stem] += 1
        if plan not in self.sessions:
            self.sessions[plan] = Engine(self.graphs[plan], threads=1).session
        session = self.sessions[plan]
        given = {tensor.name: tensor for tensor in tensors}
        binding = session.io_binding()
        for values, bind in (
            (session.get_inputs(), binding.bind_input),
            (session.get_outputs(), binding.bind_output),
        ):
            for value in values:
                _bind(bind, value, given[value.name])
        session.run_with_iobinding(binding)


def add_stand_ins(directory: Path, model: Path, target: Target, max_prefill_chunk: int) -> None:
    """Give the bundle of `model` portable graphs, and files that stand where plans would be."""
    manifest = bundle.read_manifest(directory)
    if manifest.portable is None:
        manifest = add_portable_graphs(directory, manifest, Skeleton.load(model), lambda *_: None)
    assert manifest.portable is not None
    plans = []
    for graph in manifest.portable.files():
        file = f"engines/{target}/{Path(graph).stem}.plan"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(f"stands for a plan of {graph}")
        manifest.files[file] = bundle.file_entry(directory, file)
        plans.append(PlanEntry(file=file, graph=graph, fingerprint="", seconds=0, aliases={}))
    manifest.plans[target] = PlanSet(
        version="0",
        cuda="0",
        platform="none",
        built_on=None,
        compute_capabilities=[],
        options=BuildOptions(max_prefill_chunk=max_prefill_chunk),
        plans=plans,
    )
    bundle.write_manifest(directory, manifest)


def _bind(bind: Callable[..., None], value: Any, tensor: _core.PlanTensor) -> None:
    dtype = np.dtype(_DTYPES[value.type])
    assert math.prod(tensor.shape) * dtype.itemsize == tensor.bytes, value.name
    bind(value.name, "cpu", 0, dtype, tensor.shape, tensor.address)


def rehearse(directory: Path, target: Target, threads: int) -> tuple[SedacModel, Rehearsal]:
    """The bundle, its plans of `target` rehearsed on the host."""
    executor = Rehearsal(directory, target)
    core = _core.Model(directory, find_onnxruntime(), threads, executor)
    return SedacModel(directory, core), executor
