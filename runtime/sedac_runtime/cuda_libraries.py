"""Load ONNX Runtime's CUDA provider and what it needs of NVIDIA's libraries, or say what is missing.

The libraries are found as the system finds them, or in NVIDIA's wheels, where the system does not
look. ONNX Runtime itself would only say that its provider cannot be loaded.
"""

import ctypes
import os
import sys
from pathlib import Path

from sedac_runtime._core import EngineError

_PROVIDER = "libonnxruntime_providers_cuda.so"
# opened by the provider when it is used, not when it is loaded
_CUDNN = "libcudnn.so.9"
_INSTALL = "pip install 'sedac-runtime[gpu]'"
_REMEDY = "or use --device cpu"


def load_cuda_provider(onnxruntime: Path) -> None:
    """Load the CUDA provider beside the ONNX Runtime library `onnxruntime`.

    Raises EngineError naming the provider, the NVIDIA library or the driver that is missing.
    """
    provider = onnxruntime.parent / _PROVIDER
    if not provider.exists():
        raise EngineError(
            f"{onnxruntime.name} has no CUDA provider beside it, this is the onnxruntime for CPUs;"
            f" {_INSTALL}, {_REMEDY}"
        )
    # before any handle of cuBLAS: captured work must not depend on a workspace that it shares
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    _load(provider.with_name("libonnxruntime_providers_shared.so"))
    _load(provider)
    _load(Path(_CUDNN))


def _load(library: Path) -> None:
    """Load `library`, after each library that it turns out to need."""
    known: set[str] = set()
    while True:
        try:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            # "libcudart.so.13: cannot open shared object file: No such file or directory"
            missing = str(error).partition(":")[0]
            if missing in known or "cannot open shared object file" not in str(error):
                raise EngineError(f"{library.name} cannot be loaded: {error}; {_INSTALL}") from None
            known.add(missing)
            found = _in_wheels(missing)
            if found is None:
                raise EngineError(_absence(missing)) from None
            if missing == library.name:
                library = found
            else:
                _load(found)
        else:
            return


def _in_wheels(name: str) -> Path | None:
    """The library `name` of an installed wheel of NVIDIA's."""
    for directory in sys.path:
        for path in sorted(Path(directory).glob(f"nvidia/**/lib/{name}")):
            return path
    return None


def _absence(name: str) -> str:
    needs = f"ONNX Runtime's CUDA provider needs {name}, which is not installed"
    if name.startswith("libcuda.so"):
        return f"{needs}: it comes with NVIDIA's driver; install that on a host with a GPU, {_REMEDY}"
    return f"{needs}; {_INSTALL}, {_REMEDY}"
