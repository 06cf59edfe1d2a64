"""TensorRT's Python package behind the core: it puts plans on a CUDA stream, and nothing more.

The core captures what lands on the stream and replays it, so that no Python runs between tokens.
Nobody has executed this module on a GPU yet; `ci/validate_engines.sh` is what does.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from sedac_runtime._core import EngineError, PlanTensor, read_manifest
from sedac_runtime.flavour import FLAVOURS, Device, Gpu, Target, find_gpu, incompatibility


class PlanExecutor:
    """Puts the plans of a bundle's target on streams of the first GPU, in its primary context.

    Raises EngineError when the package is not installed or the host has no GPU.
    """

    device: Device = "cuda"

    def __init__(self, target: Target, bundle: Path) -> None:
        flavour = FLAVOURS[target]
        if importlib.util.find_spec(flavour.module) is None:
            raise EngineError(
                f"backend {target} needs the Python module {flavour.module}, which is not"
                f" installed; pip install 'sedac-runtime[{target}]'"
            )
        gpu = find_gpu()
        if gpu is None:
            raise EngineError(
                f"backend {target} needs an NVIDIA GPU, and none is found here; use --backend"
                " onnxruntime"
            )
        self.target, self._gpu = target, gpu
        # now, since a relative path means nothing any more once the working directory changes
        self._plans = json.loads(read_manifest(bundle))["plans"].get(target)
        self._engines: dict[Path, Any] = {}
        self._contexts: dict[Hashable, Any] = {}
        self._tensorrt: Any = importlib.import_module(flavour.module)
        self._runtime: Any = None

    def __call__(self, plan: Path, tensors: list[PlanTensor], stream: int, replayed: bool) -> None:
        """Put `plan` on `stream`. Raises RuntimeError with what is wrong."""
        # work that is replayed goes on using its context, which nothing may change then
        key = (plan, *((each.name, each.address, tuple(each.shape)) for each in tensors))
        known = self._contexts.get(key if replayed else plan)
        context = known or self._engine(plan).create_execution_context()
        if known is None or not replayed:
            self._bind(context, tensors, stream)
        # not before: what could not be bound must not be run the next time
        self._contexts[key if replayed else plan] = context
        if not context.execute_async_v3(stream):
            raise RuntimeError("TensorRT did not put it on the stream")

    def _engine(self, plan: Path) -> Any:
        """The engine in `plan`, whose digest the core has checked by now."""
        if self._runtime is None:
            self._check(self._gpu)
            trt = self._tensorrt
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        if plan not in self._engines:
            engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if engine is None:
                raise RuntimeError(
                    "TensorRT cannot load it; build it again with sedac-export engines"
                )
            self._engines[plan] = engine
        return self._engines[plan]

    def _check(self, gpu: Gpu) -> None:
        version = self._tensorrt.__version__
        reason = incompatibility(self.target, self._plans, version, gpu)
        if reason is not None:
            raise RuntimeError(reason)

    def _bind(self, context: Any, tensors: list[PlanTensor], stream: int) -> None:
        engine, given = context.engine, {tensor.name: tensor for tensor in tensors}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        unknown = sorted(set(names) - given.keys())
        if unknown:
            raise RuntimeError(f"it has a tensor {unknown[0]}, which this runtime does not know")
        inputs = [
            name
            for name in names
            if engine.get_tensor_mode(name) == self._tensorrt.TensorIOMode.INPUT
        ]
        shapes = {name: given[name].shape for name in inputs}
        if not context.set_optimization_profile_async(_profile(engine, shapes), stream):
            raise RuntimeError("its profile cannot be set")
        for name in inputs:
            if not context.set_input_shape(name, shapes[name]):
                raise RuntimeError(f"it does not take {name} of shape {shapes[name]}")
        for name in names:
            self._check_memory(context, given[name])
            if not context.set_tensor_address(name, given[name].address):
                raise RuntimeError(f"it does not take the memory of {name}")

    def _check_memory(self, context: Any, tensor: PlanTensor) -> None:
        """Compare `tensor` with the plan's own, which TensorRT would read or write in its place."""
        engine, name = context.engine, tensor.name
        remedy = "build it again with sedac-export engines"
        on_device = engine.get_tensor_location(name) == self._tensorrt.TensorLocation.DEVICE
        if not on_device or engine.get_tensor_format(name) != self._tensorrt.TensorFormat.LINEAR:
            raise RuntimeError(f"its {name} is no plain tensor on the GPU; {remedy}")
        own = list(context.get_tensor_shape(name))
        needed = math.prod(own) * engine.get_tensor_dtype(name).itemsize
        if (own, needed) != (tensor.shape, tensor.bytes):
            raise RuntimeError(
                f"its {name} is {own} of {needed} bytes, where the bundle's is {tensor.shape} of"
                f" {tensor.bytes}; {remedy}"
            )


def _profile(engine: Any, shapes: dict[str, list[int]]) -> int:
    """The first profile that takes inputs of `shapes`."""
    for profile in range(engine.num_optimization_profiles):
        bounds = {name: engine.get_tensor_profile_shape(name, profile) for name in shapes}
        if all(
            least <= size <= most
            for name, shape in shapes.items()
            for least, size, most in zip(bounds[name][0], shape, bounds[name][2], strict=True)
        ):
            return profile
    raise RuntimeError(f"it has no profile for inputs of shapes {shapes}")
