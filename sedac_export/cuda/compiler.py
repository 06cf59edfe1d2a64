"""Compile the chain for a model's shape with NVRTC, which needs no GPU."""

import hashlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_export.bundle.cuda_entry import ChainKernel, ChainOptions, ChainShape
from sedac_export.console import StageProgress
from sedac_export.cuda.weight_blocks import WeightBlocks
from sedac_export.errors import SedacError

logger = logging.getLogger(__name__)

KERNELS = Path(__file__).with_name("kernels")
SOURCE = "chain.cu"

# the newest is also kept as PTX for what comes later
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
NEWEST = "compute_120"

# targets with setmaxnreg, which moves registers between warps; the sources tell them by
# __CUDA_ARCH_SPECIFIC__ and __CUDA_ARCH_FAMILY_SPECIFIC__ (for sm_120f, ptxas 13.0 ignores it)
_TARGETS = {"sm_90": "sm_90a", "sm_100": "sm_100f"}

# rows that an entry chain_N takes at most
ROWS = (1, 2, 4, 8)

# what a cache gives comes without ptxas's log
_FLAGS = ("-std=c++17", "-fmad=false", "-default-device", "--no-cache", "--ptxas-options=-v")
# what the sources assert
_NO_ROOM = "shared memory is too small"
# where a struct Facts has the dynamic shared memory of each entry, unsigned each
_SHARED_BYTES = range(20, 36, 4)
# of an entry: functions that it calls have properties, too, but no line of registers
_KERNEL = re.compile(
    r"Function properties for (\w+)\n.*?(\d+) bytes spill stores.*\n.*Used (\d+) registers"
)


@dataclass(frozen=True)
class CompiledChain:
    """What NVRTC made for an architecture: a cubin, or PTX for compute_N, and its kernels."""

    architecture: str
    code: bytes
    kernels: list[ChainKernel]

    @property
    def file(self) -> str:
        """The name of the file that holds it."""
        suffix = "ptx" if self.architecture.startswith("compute_") else "cubin"
        return f"chain-{self.architecture}.{suffix}"


class Compiler:
    """NVRTC and the headers that it needs.

    Raises SedacError with the install line where they are missing.
    """

    def __init__(self) -> None:
        try:
            from cuda import pathfinder
            from cuda.bindings import nvrtc

            from sedac_export.cuda.cubin import Cubin

            self.headers = pathfinder.find_nvidia_header_directory("cudart")
            pathfinder.load_nvidia_dynamic_lib("nvrtc")
            if self.headers is None:
                raise FileNotFoundError("cuda_fp16.h")
        except (ImportError, RuntimeError, FileNotFoundError) as error:
            logger.debug("NVRTC is missing: %s", error)
            raise SedacError(
                "--target cuda needs NVRTC and CUDA's headers, which are not installed;"
                " pip install 'sedac[cuda]'"
            ) from error
        self.nvrtc, self.cubin = nvrtc, Cubin

    @property
    def version(self) -> str:
        """NVRTC's version, such as 13.0."""
        return "{}.{}".format(*self._checked(self.nvrtc.nvrtcVersion()))

    def compile(self, macros: Mapping[str, str], progress: StageProgress) -> list[CompiledChain]:
        """The chain with `macros`, for each architecture, and as PTX for the newest.

        An architecture whose shared memory is too small for the model's shape is left out. Raises
        SedacError when NVRTC refuses the chain; what it says is logged.
        """
        architectures = (*ARCHITECTURES, NEWEST)
        progress("compile", 0, len(architectures))
        # NVRTC compiles on several threads at once: 13.0 s instead of 22.1 for two on two cores
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = []
            chains = pool.map(lambda a: self.compile_for(a, macros), architectures)
            for done, chain in enumerate(chains, 1):
                if chain is not None:
                    compiled.append(chain)
                progress("compile", done, len(architectures))
        if not compiled:
            raise SedacError(
                "no GPU has the shared memory that the chain takes for this model's shape; leave"
                " the target cuda out"
            )
        return compiled

    def compile_for(self, architecture: str, macros: Mapping[str, str]) -> CompiledChain | None:
        """The chain with `macros` for one architecture; None where its shared memory is too small.

        Raises SedacError when NVRTC refuses the chain; what it says is logged.
        """
        nvrtc = self.nvrtc
        text = (KERNELS / SOURCE).read_bytes()
        (program,) = self._checked(nvrtc.nvrtcCreateProgram(text, SOURCE.encode(), 0, None, None))
        try:
            options = [
                *(option.encode() for option in _options(architecture, macros)),
                f"-I{KERNELS}".encode(),
                f"-I{self.headers}".encode(),
            ]
            (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
            log = self._text(program, "ProgramLog").decode().rstrip("\0")
            if result != nvrtc.nvrtcResult.NVRTC_SUCCESS and _NO_ROOM in log:
                logger.info("the chain does not fit %s: %s", architecture, _NO_ROOM)
                return None
            if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise _refusal(architecture, log, self.version)
            if architecture.startswith("compute_"):
                # the core refuses the zero at its end
                return CompiledChain(architecture, self._text(program, "PTX").rstrip(b"\0"), [])
            cubin = self._text(program, "CUBIN")
            return CompiledChain(architecture, cubin, self._kernels(log, cubin))
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _kernels(self, log: str, cubin: bytes) -> list[ChainKernel]:
        """What each entry takes: ptxas tells it in the log, and the cubin in its facts."""
        facts = self.cubin(cubin).facts()
        used = {name: (int(count), int(spilled)) for name, spilled, count in _KERNEL.findall(log)}
        kernels = []
        for rows, place in zip(ROWS, _SHARED_BYTES, strict=True):
            registers, spilled = used[f"chain_{rows}"]
            shared = int.from_bytes(facts[place : place + 4], "little")
            kernel = ChainKernel(
                rows=rows, registers=registers, shared_bytes=shared, spilled_bytes=spilled
            )
            kernels.append(kernel)
        return kernels

    def _text(self, program: Any, what: str) -> bytes:
        """The log, PTX or cubin of `program`."""
        size: int
        (size,) = self._checked(getattr(self.nvrtc, f"nvrtcGet{what}Size")(program))
        text = bytes(size)
        self._checked(getattr(self.nvrtc, f"nvrtcGet{what}")(program, text))
        return text

    def _checked(self, results: tuple[Any, ...]) -> tuple[Any, ...]:
        result, *values = results
        if result != self.nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise SedacError(f"NVRTC failed: {result}; install sedac[cuda] anew")
        return tuple(values)


def chain_macros(
    shape: ChainShape,
    options: ChainOptions,
    tables: int,
    vectors: Collection[str],
    blocks: WeightBlocks,
) -> dict[str, str]:
    """What the sources are compiled with.

    tables is the number of rotary tables, vectors are the names of the layers' norms and biases.
    """
    sizes = {f"SEDAC_{name.upper()}": str(size) for name, size in shape.model_dump().items()}
    numbers = {
        f"SEDAC_{name.upper()}": f"{value!r}f"
        for name, value in options.model_dump(exclude={"activation"}).items()
    }
    return {
        **sizes,
        **numbers,
        "SEDAC_GELU": str(int(options.activation == "gelu_tanh")),
        "SEDAC_ROTARY_TABLES": str(tables),
        "SEDAC_QUERY_KEY_NORM": str(int("query_norm" in vectors)),
        "SEDAC_POST_NORMS": str(int("mlp_post_norm" in vectors)),
        "SEDAC_WEIGHT_BITS": str(blocks.bits),
        "SEDAC_ZERO_POINTS": str(int(blocks.zero_points)),
    }


def fingerprint(macros: Mapping[str, str]) -> str:
    """SHA-256 of the sources and of the options that they are compiled with."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.cu*")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    for architecture in (*ARCHITECTURES, NEWEST):
        digest.update("\0".join(_options(architecture, macros)).encode())
    return digest.hexdigest()


def _options(architecture: str, macros: Mapping[str, str]) -> list[str]:
    defined = [f"-D{name}={value}" for name, value in macros.items()]
    target = _TARGETS.get(architecture, architecture)
    return [f"--gpu-architecture={target}", *_FLAGS, *defined]


def _refusal(architecture: str, log: str, version: str) -> SedacError:
    logger.debug("NVRTC %s, %s:\n%s", version, architecture, log)
    lines = log.splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no reason")
    return SedacError(
        f"NVRTC {version} does not compile the chain for {architecture}: {first.strip()};"
        " --log-level debug shows all that it says"
    )
