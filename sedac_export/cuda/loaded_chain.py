"""A compiled chain on the current CUDA context: its kernels, and how passes are launched."""

import ctypes
from typing import Any

from cuda.bindings import driver

from sedac_export.cuda.chain_abi import BatchKernel, BatchPass, DraftPass, Facts, Pass
from sedac_export.cuda.compiler import ROWS
from sedac_export.cuda.cubin import FACTS
from sedac_export.errors import SedacError

# what a layer launches, each with its stage, of more rows than one kernel takes
_LAYER = (
    *((BatchKernel.PREFILL_QKV, 0), (BatchKernel.HEADS, 0)),
    *((BatchKernel.ATTENTION, 0), (BatchKernel.PREFILL_ATTENTION, 0)),
    *((BatchKernel.PREFILL_O, 1), (BatchKernel.ADD, 1)),
    *((BatchKernel.PREFILL_GATE_UP, 2), (BatchKernel.PREFILL_DOWN, 3), (BatchKernel.ADD, 3)),
)
_COOPERATIVE = (BatchKernel.HEAD, BatchKernel.WHOLE)


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
        device = checked(driver.cuCtxGetDevice())
        units = checked(driver.cuDeviceGetAttribute(count, device))
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
        self._batch = [self._function(kernel.entry) for kernel in BatchKernel]
        for function, launch in zip(self._batch, self.facts.batch, strict=True):
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
        sizes = self.blocks, self.facts.threads, self.facts.shared_bytes[ROWS.index(rows)]
        self._cooperative(self._entries[rows], sizes, parameters, stream)

    def run_batch(self, parameters: BatchPass, layers: int, stream: int = 0) -> None:
        """Enqueue a batch through all layers of a model."""
        parameters.form_groups()
        if not parameters.is_large:
            self._launch(BatchKernel.WHOLE, parameters, (0, 0), stream)
            return
        self._launch(BatchKernel.START, parameters, (0, 0), stream)
        for layer in range(layers):
            for kernel, stage in _LAYER:
                self._launch(kernel, parameters, (layer, stage), stream)
        self._launch(BatchKernel.HEAD, parameters, (0, 0), stream)

    def _launch(
        self, kernel: BatchKernel, parameters: BatchPass, place: tuple[int, int], stream: int
    ) -> None:
        """Enqueue a kernel of a layer's stage, if it has rows."""
        rows = _rows_of(kernel, parameters)
        if not rows:
            return
        launch, entry = self.facts.batch[kernel], self._batch[kernel]
        numbers = (ctypes.c_int * 2)(*place)
        places = ctypes.addressof(numbers), ctypes.addressof(numbers) + ctypes.sizeof(ctypes.c_int)
        addresses = (ctypes.c_void_p * 3)(ctypes.addressof(parameters), *places)
        grid = (-(-rows // launch.rows), launch.blocks or self.blocks, 1)
        sizes = (*grid, launch.threads, 1, 1, launch.shared_bytes)
        parameter = ctypes.addressof(addresses)
        if kernel in _COOPERATIVE:
            checked(driver.cuLaunchCooperativeKernel(entry, *sizes, stream, parameter))
        else:
            checked(driver.cuLaunchKernel(entry, *sizes, stream, parameter, 0))

    def draft(self, parameters: DraftPass, stream: int = 0) -> None:
        """Enqueue a launch of a trained drafter."""
        blocks = parameters.blocks * parameters.sequences
        sizes = blocks, self.facts.draft_threads, self.facts.draft_shared_bytes
        self._cooperative(self._draft, sizes, parameters, stream)

    def _cooperative(
        self, entry: Any, sizes: tuple[int, int, int], parameters: Pass | DraftPass, stream: int
    ) -> None:
        """Enqueue a kernel of so many blocks, threads of each and bytes of shared memory."""
        blocks, threads, shared = sizes
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        launch, grid = driver.cuLaunchCooperativeKernel, (blocks, 1, 1, threads, 1, 1)
        checked(launch(entry, *grid, shared, stream, ctypes.addressof(addresses)))

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


def _rows_of(kernel: BatchKernel, parameters: BatchPass) -> int:
    """What the kernel's blocks are for."""
    if kernel is BatchKernel.HEAD:
        return int(parameters.logits_rows)
    if kernel is BatchKernel.ATTENTION:
        return int(parameters.single_rows)
    if kernel is BatchKernel.PREFILL_ATTENTION:
        return int(parameters.groups)
    return int(parameters.rows)


def checked(results: tuple[Any, ...]) -> Any:
    """What a call of the driver returns. Raises SedacError with the name of its error."""
    status, *values = results
    if status != driver.CUresult.CUDA_SUCCESS:
        raise SedacError(f"the CUDA driver failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
