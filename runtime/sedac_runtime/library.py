"""Find the ONNX Runtime library inside the installed onnxruntime package."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from sedac_runtime._core import EngineError

_PATTERNS = ("libonnxruntime.so*", "libonnxruntime*.dylib", "onnxruntime.dll")


def find_onnxruntime() -> Path:
    """Path of the shared library that the onnxruntime wheel carries, or onnxruntime-gpu's.

    Both wheels write into one package; where both are installed it is onnxruntime-gpu's library,
    which can do what the other can. Raises EngineError when the package is not installed or
    carries no library.
    """
    # the package itself is not imported: its Python side would load a second copy of itself
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("onnxruntime is not installed; pip install onnxruntime")
    capi = Path(spec.submodule_search_locations[0]) / "capi"
    for pattern in _PATTERNS:
        found = sorted(capi.glob(pattern))
        if found:
            version = _gpu_version()
            own = (path for path in found if version and path.name.endswith(f".so.{version}"))
            return next(own, found[0])
    raise EngineError(f"{capi} holds no ONNX Runtime library; pip install --force onnxruntime")


def _gpu_version() -> str | None:
    try:
        return importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def default_threads() -> int:
    """As many threads as this process may use processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
