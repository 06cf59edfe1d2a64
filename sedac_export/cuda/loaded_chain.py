"""A compiled chain on the current CUDA context: its kernels, and how passes are launched."""

import ctypes
from typing import Any

from cuda.bindings import driver

from sedac_export.cuda.chain_abi import PREFILL_LAUNCHES, DraftPass, Facts, Pass, PrefillPass
from sedac_export.cuda.compiler import ROWS
from sedac_export.cuda.cubin import FACTS
from sedac_export.errors import SedacError


class UnsupportedGpuError(SedacError):
    """The GPU cannot run the chain, or not for this shape."""


class LoadedChain:
    """The kernels of a cubin, or of PTX that the driver compiles.

    blocks: of a pass. Raises UnsupportedGpuError where the GPU has too few multiprocessors, and
    SedacError when the driver refuses the code or its structs are not those of chain_abi.
    """

    def __init__(self, code: bytes) -> None:
        # the driver reads PTX up to a zero
        self._module = checked(driver.cuModuleLoadData(code + b"\0"))
        self.facts = self._read_facts()
        count = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        units = checked(driver.cuDeviceGetAttribute(count, checked(driver.cuCtxGetDevice())))
        self.blocks = min(self.facts.max_blocks, units)
        if self.blocks < self.facts.min_blocks:
            raise UnsupportedGpuError(
                f"the chain needs {self.facts.min_blocks} multiprocessors, and the GPU has {units}"
            )
        self._prepare, self._gather = self._function("prepare"), self._function("gather_rows")
        self._steps = 1  # the next pass's number: scratch that nothing wrote to holds 0
        self._entries = {rows: self._function(f"chain_{rows}") for rows in ROWS}
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for function, shared in zip(self._entries.values(), self.facts.shared_bytes, strict=True):
            checked(driver.cuFuncSetAttribute(function, limit, shared))
        # a multiprocessor is idle while its memory is divided anew
        carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        self._prefill = [self._function(f"prefill_{name}") for name, _ in PREFILL_LAUNCHES]
        for function, launch in zip(self._prefill, self.facts.prefill, strict=True):
            checked(driver.cuFuncSetAttribute(function, limit, launch.shared_bytes))
            checked(driver.cuFuncSetAttribute(function, carveout, 100))
        self._draft = self._function("draft")
        checked(driver.cuFuncSetAttribute(self._draft, limit, self.facts.draft_shared_bytes))

    def prepare(self, tables: int, stream: int = 0) -> None:
        """Enqueue what writes the tables, table_bytes for each block, at an address."""
        parameters = ((tables, self.blocks), (ctypes.c_uint64, ctypes.c_int))
        checked(driver.cuLaunchKernel(self._prepare, *self._sizes(), 0, stream, parameters, 0))

    def gather_rows(self, matrix: int, tokens: int, rows: int, count: int, stream: int = 0) -> None:
        """Enqueue what copies rows of a packed matrix, as fp16, at addresses; tokens are int32."""
        kinds = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
        launch, threads = driver.cuLaunchKernel, 128
        parameters = ((matrix, tokens, rows), kinds)
        checked(launch(self._gather, count, 1, 1, threads, 1, 1, 0, stream, parameters, 0))

    def launch(self, parameters: Pass, stream: int = 0) -> None:
        """Enqueue a pass on the smallest kernel that takes its rows, and number it."""
        parameters.number, self._steps = self._steps, self._steps + max(parameters.steps, 1)
        rows = next(rows for rows in ROWS if rows >= parameters.rows)
        shared = self.facts.shared_bytes[ROWS.index(rows)]
        self._cooperative(self._entries[rows], self.facts.threads, shared, parameters, stream)

    def prefill(self, parameters: PrefillPass, layers: int, stream: int = 0) -> None:
        """Enqueue a prefill through all layers of a model."""
        self._launch_prefill(0, parameters, 0, stream)
        for layer in range(layers):
            for index in range(1, len(PREFILL_LAUNCHES)):
                self._launch_prefill(index, parameters, layer, stream)

    def _launch_prefill(self, index: int, parameters: PrefillPass, layer: int, stream: int) -> None:
        launch, stage = self.facts.prefill[index], PREFILL_LAUNCHES[index][1]
        numbers = (ctypes.c_int * 2)(layer, stage)
        places = ctypes.addressof(numbers), ctypes.addressof(numbers) + ctypes.sizeof(ctypes.c_int)
        addresses = (ctypes.c_void_p * 3)(ctypes.addressof(parameters), *places)
        grid = -(-parameters.rows // launch.rows), launch.blocks, 1
        sizes = *grid, launch.threads, 1, 1, launch.shared_bytes
        entry, parameter = self._prefill[index], ctypes.addressof(addresses)
        checked(driver.cuLaunchKernel(entry, *sizes, stream, parameter, 0))

    def draft(self, parameters: DraftPass, stream: int = 0) -> None:
        """Enqueue a launch of a trained drafter."""
        threads, shared = self.facts.draft_threads, self.facts.draft_shared_bytes
        self._cooperative(self._draft, threads, shared, parameters, stream)

    def _cooperative(
        self, entry: Any, threads: int, shared: int, parameters: Pass | DraftPass, stream: int
    ) -> None:
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        sizes = self.blocks, 1, 1, threads, 1, 1
        launch = driver.cuLaunchCooperativeKernel
        checked(launch(entry, *sizes, shared, stream, ctypes.addressof(addresses)))

    def _sizes(self) -> tuple[int, ...]:
        """Of the grid and of a block."""
        return self.blocks, 1, 1, self.facts.threads, 1, 1

    def _read_facts(self) -> Facts:
        address, size = checked(driver.cuModuleGetGlobal(self._module, FACTS.encode()))
        facts = Facts()
        if size == ctypes.sizeof(Facts):
            checked(driver.cuMemcpyDtoH(ctypes.addressof(facts), address, size))
        if not facts.fit():
            raise SedacError(
                "the chain was compiled from the sources of another version; build it again with"
                " sedac-export engines --target cuda"
            )
        return facts

    def _function(self, name: str) -> Any:
        return checked(driver.cuModuleGetFunction(self._module, name.encode()))


def checked(results: tuple[Any, ...]) -> Any:
    """What a call of the driver returns. Raises SedacError with the name of its error."""
    status, *values = results
    if status != driver.CUresult.CUDA_SUCCESS:
        raise SedacError(f"the CUDA driver failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
