"""Memory of the first GPU, through the driver alone."""

import ctypes
import time
from types import TracebackType
from typing import Any

import numpy as np
from cuda.bindings import driver

from sedac_export.arrays import Array
from sedac_export.cuda.loaded_chain import checked
from sedac_export.errors import SedacError

# s that a pass may take before it is taken for one that waits for itself
_PATIENCE = 60


class GpuMemory:
    """Makes the first GPU's context current, and frees all that is allocated at the end.

    Raises SedacError where the driver finds no GPU or no memory is left.
    """

    def __init__(self) -> None:
        self._device: list[Any] = []
        self._host: list[int] = []
        self._hangs = False

    def __enter__(self) -> "GpuMemory":
        try:
            checked(driver.cuInit(0))
        except RuntimeError as error:
            raise SedacError("the NVIDIA driver's libcuda is not found") from error
        self._gpu = checked(driver.cuDeviceGet(0))
        checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(self._gpu))))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._hangs:
            return  # freeing would wait for the kernel, which the end of the process ends
        for address in self._device:
            driver.cuMemFree(address)
        for place in self._host:
            driver.cuMemFreeHost(place)
        driver.cuDevicePrimaryCtxRelease(self._gpu)

    def zeros(self, size: int) -> int:
        """The address of `size` bytes, all zero."""
        address = checked(driver.cuMemAlloc(max(size, 1)))
        self._device.append(address)
        checked(driver.cuMemsetD8(address, 0, max(size, 1)))
        return int(address)

    def upload(self, array: Array) -> int:
        """The address of a copy of `array`."""
        address = self.zeros(array.nbytes)
        self.write(address, array)
        return address

    def write(self, address: int, array: Array) -> None:
        """Copy `array` to an address."""
        held = np.ascontiguousarray(array)
        checked(driver.cuMemcpyHtoD(address, held.ctypes.data, held.nbytes))

    def read(self, address: int, array: Array) -> None:
        """Fill the contiguous `array` from an address."""
        checked(driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes))

    def shared(self, kind: type[ctypes.Structure]) -> Any:
        """A `kind` in the host's memory, which the GPU writes at the same address."""
        place = int(checked(driver.cuMemHostAlloc(ctypes.sizeof(kind), 0)))
        self._host.append(place)
        return kind.from_address(place)

    def synchronize(self) -> None:
        """Wait until the GPU is done. Raises SedacError when it is not for a minute."""
        limit = time.monotonic() + _PATIENCE
        while (status := driver.cuStreamQuery(0)[0]) == driver.CUresult.CUDA_ERROR_NOT_READY:
            if time.monotonic() > limit:
                self._hangs = True
                raise SedacError(f"a pass has not ended after {_PATIENCE} s")
        checked((status,))
