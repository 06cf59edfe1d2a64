"""What a worker does with TensorRT, through polygraphy. Imported in the worker only.

Every function takes and returns what JSON can hold.
"""

import contextlib
import io
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy import config
from polygraphy.backend.trt import (
    CreateConfig,
    Profile,
    TrtRunner,
    engine_bytes_from_network,
    engine_from_bytes,
    network_from_onnx_path,
    set_decomposable_attentions,
)
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from polygraphy.mod.trt_importer import lazy_import_trt

trt = lazy_import_trt()

# int64 inputs are ours on purpose; what else TensorRT warns of has no one to read it
G_LOGGER.module_severity = G_LOGGER.ERROR

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def version() -> str:
    """The flavour's version."""
    return str(trt.__version__)


def describe(graph: str) -> dict[str, Any]:
    """The network that TensorRT's parser makes of the ONNX file `graph`.

    inputs and outputs: name -> [dtype, shape with -1 for open axes]; layers: type -> count;
    aliases: each output of a cache update -> the input that it is written to.
    """
    with _reasons(graph):
        _, network, _ = network_from_onnx_path(graph)
        return _describe(network)


def build(
    graph: str,
    plan: str,
    profiles: list[dict[str, list[list[int]]]],
    options: dict[str, Any],
    decomposable: bool,
    timing_cache: str,
) -> dict[str, Any]:
    """Build `graph` into the file `plan`; the seconds it took and the network's aliases.

    profiles: input -> smallest, expected and largest shape. decomposable lets attention be built
    from primitives where there is no fused kernel, as in fp32.
    """
    started = time.monotonic()
    with _reasons(graph):
        loaded = network_from_onnx_path(graph)
        aliases = _describe(loaded[1])["aliases"]
        if decomposable:
            loaded = set_decomposable_attentions(loaded)
        settings = _config(profiles, options, timing_cache)
        data = bytes(engine_bytes_from_network(loaded, settings, save_timing_cache=timing_cache))
    Path(plan).write_bytes(data)
    return {"seconds": time.monotonic() - started, "aliases": aliases}


def inspect(plan: str) -> dict[str, Any]:
    """The engine in `plan`, as `describe` has it, with the shapes of each profile.

    information is what the engine inspector tells of its layers.
    """
    with _reasons(plan):
        engine = engine_from_bytes(Path(plan).read_bytes())
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        tensors = {
            name: [_dtype(engine.get_tensor_dtype(name)), list(engine.get_tensor_shape(name))]
            for name in names
        }
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        aliases = {name: engine.get_aliased_input_tensor(name) for name in outputs}
        information = engine.create_engine_inspector().get_engine_information(
            trt.LayerInformationFormat.JSON
        )
        return {
            "inputs": {name: tensors[name] for name in inputs},
            "outputs": {name: tensors[name] for name in outputs},
            "aliases": {name: alias for name, alias in aliases.items() if alias},
            "profiles": [
                {
                    name: [list(shape) for shape in engine.get_tensor_profile_shape(name, profile)]
                    for name in inputs
                }
                for profile in range(engine.num_optimization_profiles)
            ],
            "information": information,
        }


def run(plan: str, profile: int, feeds: str, results: str) -> None:
    """Run `plan` on the arrays of the npz file `feeds`; its outputs, fp32 or as they are.

    feeds are cast to the engine's dtypes.
    """
    with _reasons(plan):
        engine = engine_from_bytes(Path(plan).read_bytes())
        with np.load(feeds) as arrays:
            tensors = {
                name: _typed(arrays[name], _dtype(engine.get_tensor_dtype(name)))
                for name in arrays.files
            }
        runner = TrtRunner(engine, optimization_profile=profile)
        outputs = Comparator.run([runner], data_loader=[tensors])[0][1][0]
        arrays = {name: _array(output) for name, output in outputs.items()}
        np.savez(results, **arrays)


def _typed(array: Any, dtype: str) -> Any:
    """`array` in `dtype`, of which numpy has all but one."""
    if dtype == "bfloat16":
        import torch

        return torch.from_numpy(array).bfloat16()
    return array.astype(dtype)


def _array(output: Any) -> Any:
    # imported here: it takes three seconds, and only plans that run need it
    import torch

    tensor = output if isinstance(output, torch.Tensor) else torch.from_numpy(np.asarray(output))
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def _config(
    profiles: list[dict[str, list[list[int]]]], options: dict[str, Any], timing_cache: str
) -> Any:
    arguments: dict[str, Any] = {
        "profiles": [_profile(shapes) for shapes in profiles],
        "load_timing_cache": timing_cache if Path(timing_cache).exists() else None,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "version_compatible": options["version_compatible"],
        "exclude_lean_runtime": options["version_compatible"],
    }
    if config.USE_TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [tuple(map(int, c.split("."))) for c in options["compute_capabilities"]]
        return CreateConfigRTX(compute_capabilities=capabilities, **arguments)
    if options["hardware_compatible"]:
        arguments["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return CreateConfig(**arguments)


def _profile(shapes: dict[str, list[list[int]]]) -> Profile:
    profile = Profile()
    for name, (smallest, expected, largest) in shapes.items():
        profile.add(name, smallest, expected, largest)
    return profile


def _describe(network: Any) -> dict[str, Any]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    given, named = {tensor.name for tensor in inputs}, {tensor.name for tensor in outputs}
    aliases = {}
    for layer in layers:
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            present, past = layer.get_output(0).name, layer.get_input(0).name
            if present in named and past in given:
                aliases[present] = past
    return {
        "inputs": {tensor.name: _tensor(tensor) for tensor in inputs},
        "outputs": {tensor.name: _tensor(tensor) for tensor in outputs},
        "layers": dict(Counter(layer.type.name for layer in layers)),
        "aliases": aliases,
    }


def _tensor(tensor: Any) -> list[Any]:
    return [_dtype(tensor.dtype), list(tensor.shape)]


def _dtype(dtype: Any) -> str:
    name: str = dtype.name
    return _DTYPES.get(name, name.lower())


@contextlib.contextmanager
def _reasons(file: str) -> Iterator[None]:
    """An error of TensorRT with the reason that it logged, about `file`."""
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            yield
    except Exception as error:
        raise RuntimeError(f"{Path(file).name}: {_reason(log.getvalue(), str(error))}") from error


def _reason(log: str, error: str) -> str:
    operators = re.findall(r"and operator: (\w+) \(\w+\): (\w+): (.*)", log)
    if operators:
        operator, kind, detail = operators[0]
        return f"operator {operator} is not supported ({kind}: {detail})"
    logged = [line[4:] for line in log.splitlines() if line.startswith("[E] ")]
    return logged[0] if logged else error
