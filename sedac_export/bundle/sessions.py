"""ONNX Runtime sessions over a bundle's engines, for passes of many tokens."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_runtime import _core

THREADS = 2

# names of ONNX Runtime's providers
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# caches by the names of the inputs that they are, such as past_key_0
Caches = Mapping[str, onnxruntime.OrtValue]

# kOrtSessionOptionsModelExternalInitializersFileFolderPath
_WEIGHTS_DIRECTORY = "session.model_external_initializers_file_folder_path"


class Engine:
    """One graph, loaded, its external weights from the directory `weights`.

    Caches are updated in place. optimized False is for graphs that run a handful of times: it
    spends neither time nor memory on speed.
    """

    def __init__(
        self,
        model: Path | bytes,
        threads: int = THREADS,
        weights: Path | None = None,
        optimized: bool = True,
        provider: str = CPU,
    ) -> None:
        options = onnxruntime.SessionOptions()
        if not optimized:
            disabled = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = disabled
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.intra_op_num_threads = threads
        # many sessions take turns: threads that spin for one hold up the next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        # what was checked is ONNX, and the same bytes may be ONNX Runtime's own format, too
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.register_custom_ops_library(_core.__file__)
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_DIRECTORY, str(weights))
        self.session = onnxruntime.InferenceSession(model, options, providers=[provider])
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, Array], caches: Caches | None = None) -> dict[str, Array]:
        """The outputs by name but those in `caches`; what the graph does not take is ignored."""
        binding = self.bind(feeds, caches)
        self.session.run_with_iobinding(binding)
        values = zip(binding.get_outputs(), self.outputs, strict=True)
        return {name: value.numpy() for value, name in values if _past(name) not in (caches or {})}

    def bind(
        self, feeds: Mapping[str, Array], caches: Caches | None = None
    ) -> onnxruntime.IOBinding:
        """What `run` runs."""
        binding = self.session.io_binding()
        for name, array in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in (caches or {}).items():
            binding.bind_ortvalue_input(name, cache)
        for name in self.outputs:
            cache = (caches or {}).get(_past(name))
            if cache is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_ortvalue_output(name, cache)
        return binding


def exact_graph(path: Path) -> bytes:
    """The graph in `path`, its products with quantized weights computed in fp32.

    What is left of their difference from products with the weights that they stand for is
    rounding.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if attribute.name == "accuracy_level":
                node.attribute.remove(attribute)
    graph: bytes = model.SerializeToString()
    return graph


def _past(present: str) -> str:
    return present.replace("present_", "past_")


def shipped_graph(graph: bytes) -> bytes:
    """`graph` as the runtime runs it on the CPU: what it gives has the same bits."""
    return _core.with_own_operators(graph) or graph


def load_engine(bundle: Bundle, file: str, threads: int = THREADS) -> Engine:
    """The engine in `file` of `bundle`. Raises SedacError when it is not as it was checked."""
    entry = bundle.files.graph(file)
    return Engine(shipped_graph(entry.graph), threads, entry.directory)


def empty_cache(heads: int, length: int, size: int) -> onnxruntime.OrtValue:
    """Zeros of one layer's keys or values, fp32 [1, heads, length, size]."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(
        np.zeros((1, heads, length, size), dtype=np.float32)
    )
