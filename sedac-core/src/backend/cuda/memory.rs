//! Memory of a GPU, and what of the host's it reads and writes.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};

use crate::backend::gpu::failed;
use crate::error::Result;

/// Bytes of the GPU that nobody has.
pub(super) fn free_memory(stream: &Arc<CudaStream>) -> Result<u64> {
    // what was freed in the stream's order goes back then
    stream.synchronize().map_err(failed("the GPU"))?;
    let (free, _) = stream.context().mem_get_info().map_err(failed("the GPU"))?;
    Ok(free as u64)
}

/// `bytes` bytes of zeros.
pub(super) fn zeros(stream: &Arc<CudaStream>, bytes: u64) -> Result<CudaSlice<u8>> {
    let slice = stream.alloc_zeros::<u8>(bytes.max(1) as usize);
    slice.map_err(failed(format!("{bytes} bytes of GPU memory")))
}

/// `count` values of the host's memory, all `value`. The device has the host's address for it, as for
/// all memory that the driver pins.
pub(super) fn pinned<T: DeviceRepr + ValidAsZeroBits + Copy>(
    stream: &Arc<CudaStream>,
    count: usize,
    value: T,
) -> Result<PinnedHostSlice<T>> {
    // SAFETY: nothing reads it before the next lines have written all of it
    let memory = unsafe { stream.context().alloc_pinned_with_flags::<T>(count, 0) };
    let mut memory = memory.map_err(failed("pinned memory"))?;
    let places = memory.as_mut_slice().map_err(failed("pinned memory"))?;
    places.fill(value);
    Ok(memory)
}
