"""Load the NVIDIA libraries that ONNX Runtime's CUDA provider is linked to, or say what is missing.

They are found where the system looks, or in NVIDIA's wheels, where it does not look. ONNX Runtime
itself would only say that its provider cannot be loaded.
"""

import ctypes
import mmap
import os
import struct
import sys
from pathlib import Path

from sedac_runtime._core import EngineError

_PROVIDER = "libonnxruntime_providers_cuda.so"
# opened by the provider when it is used, not when it is loaded
_CUDNN = "libcudnn.so.9"
_REMEDY = "pip install 'sedac-runtime[gpu]', or use --device cpu"

# of ELF files: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5


def load_cuda_libraries(onnxruntime: Path) -> None:
    """Load what the CUDA provider beside the ONNX Runtime library `onnxruntime` needs.

    The provider itself is for ONNX Runtime to load: it crashes a process that has not set its host.
    Raises EngineError naming the provider, the NVIDIA library or the driver that is missing.
    """
    provider = onnxruntime.parent / _PROVIDER
    if not provider.exists():
        raise EngineError(
            f"{onnxruntime.name} is the ONNX Runtime for CPUs: there is no CUDA provider beside it;"
            f" {_REMEDY}"
        )
    # before any handle of cuBLAS: captured work must not depend on a workspace that it shares
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    for name in [*needed(provider), _CUDNN]:
        _load(name)


def needed(library: Path) -> list[str]:
    """The names of the libraries that `library`, a 64-bit ELF file, is linked to."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (start,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
        segments = [
            (kind, offset, address, length) for kind, _, offset, address, _, length in headers
        ]
        _, offset, _, length = next(s for s in segments if s[0] == _PT_DYNAMIC)
        entries = list(struct.iter_unpack("<qQ", data[offset : offset + length]))
        table = next(value for tag, value in entries if tag == _DT_STRTAB)
        names = next(
            table - address + offset
            for kind, offset, address, length in segments
            if kind == _PT_LOAD and address <= table < address + length
        )
        starts = [names + value for tag, value in entries if tag == _DT_NEEDED]
        return [data[start : data.find(b"\0", start)].decode() for start in starts]


def _load(name: str) -> None:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        found = _in_wheels(name)
        if found is None:
            raise EngineError(_absence(name)) from None
        try:
            ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise EngineError(f"{found} cannot be loaded: {error}; {_REMEDY}") from error


def _in_wheels(name: str) -> Path | None:
    """The library `name` of an installed wheel of NVIDIA's."""
    for directory in sys.path:
        for path in sorted(Path(directory).glob(f"nvidia/*/lib/{name}")):
            return path
    return None


def _absence(name: str) -> str:
    reason = f"ONNX Runtime's CUDA provider needs {name}, which is not installed"
    if name.startswith("libcuda.so"):
        return f"{reason}: it comes with NVIDIA's driver; use --device cpu on a host without a GPU"
    return f"{reason}; {_REMEDY}"
