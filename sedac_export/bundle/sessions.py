"""ONNX Runtime sessions over a bundle's engines, for passes of many tokens."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle

THREADS = 2

# kOrtSessionOptionsModelExternalInitializersFileFolderPath
_WEIGHTS_DIRECTORY = "session.model_external_initializers_file_folder_path"


class Engine:
    """One graph, loaded, its external weights from the directory `weights`.

    Caches are updated in place.
    """

    def __init__(
        self, model: Path | bytes, threads: int = THREADS, weights: Path | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # many sessions take turns: threads that spin for one keep the next from working
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        # what was checked is ONNX, and the same bytes may be ONNX Runtime's own format, too
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_DIRECTORY, str(weights))
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name for value in self.session.get_inputs()}
        outputs = [value.name for value in self.session.get_outputs()]
        self._wanted = [name for name in outputs if not name.startswith("present_")]

    def run(
        self, feeds: Mapping[str, Array], caches: Mapping[str, onnxruntime.OrtValue] | None = None
    ) -> dict[str, Array]:
        """The outputs by name, caches aside; of `feeds` what the graph does not take is ignored."""
        binding = self.bind(feeds, caches)
        self.session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {name: values[index].numpy() for index, name in enumerate(self._wanted)}

    def bind(
        self, feeds: Mapping[str, Array], caches: Mapping[str, onnxruntime.OrtValue] | None = None
    ) -> onnxruntime.IOBinding:
        """What `run` runs."""
        binding = self.session.io_binding()
        for name, array in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._wanted:
            binding.bind_output(name, "cpu")
        for name, cache in (caches or {}).items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past", "present"), cache)
        return binding


def load_engine(bundle: Bundle, file: str, threads: int = THREADS) -> Engine:
    """The engine in `file` of `bundle`. Raises SedacError when it is not as it was checked."""
    entry = bundle.files.graph(file)
    return Engine(entry.graph, threads, entry.directory)


def empty_cache(heads: int, length: int, size: int) -> onnxruntime.OrtValue:
    """Zeros of one layer's keys or values, fp32 [1, heads, length, size]."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(
        np.zeros((1, heads, length, size), dtype=np.float32)
    )


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session that spends no memory on speed: each engine runs a handful of times."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3  # the caches are copied here on purpose
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
