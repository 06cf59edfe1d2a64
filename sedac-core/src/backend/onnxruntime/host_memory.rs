//! Numbers in the host's memory that engines read and write.

use std::alloc::{Layout, alloc_zeroed};

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};

use super::runtime::{Memory, provider_error};
use crate::error::Result;

/// The bytes that kernels load at once.
const ALIGNMENT: usize = 64;

/// Numbers that begin as zeros. The system gives memory for them where they are written.
pub(super) struct HostMemory {
    memory: Vec<f32>,
    /// The first number that is aligned.
    start: usize,
    /// Of its first number.
    address: u64,
    info: MemoryInfo<'static>,
}

impl HostMemory {
    /// As many as `count`; None where the system has no room for them.
    pub(super) fn new(count: usize) -> Result<Option<Self>> {
        let Some(mut memory) = zeros(count.saturating_add(ALIGNMENT / size_of::<f32>())) else {
            return Ok(None);
        };
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        let device = AllocationDevice::CPU;
        let info = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default);
        Ok(Some(Self {
            address: memory[start..].as_mut_ptr().expose_provenance() as u64,
            memory,
            start,
            info: info.map_err(provider_error)?,
        }))
    }

    pub(super) fn numbers(&self) -> &[f32] {
        &self.memory[self.start..]
    }

    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..]
    }

    /// A tensor of `shape` from the number `first` on.
    ///
    /// # Panics
    /// When it does not lie inside.
    pub(super) fn tensor<'a>(&'a self, first: usize, shape: &'a [usize]) -> Memory<'a> {
        let count: usize = shape.iter().product();
        assert!(first + count <= self.numbers().len(), "a tensor in memory");
        Memory {
            info: &self.info,
            address: self.address + (first * size_of::<f32>()) as u64,
            shape,
            bytes: count * size_of::<f32>(),
        }
    }
}

/// `count` zeros, 1 or more. None where the system has no room for them; a vector would abort.
fn zeros(count: usize) -> Option<Vec<f32>> {
    let layout = Layout::array::<f32>(count).ok()?;
    // SAFETY: the size of `layout` is above 0, as `count` is.
    let first = unsafe { alloc_zeroed(layout) }.cast::<f32>();
    if first.is_null() {
        return None;
    }
    // SAFETY: `first` was allocated by the global allocator with the layout of `count` numbers, and all
    // are initialised: 0.0 is zero bytes.
    Some(unsafe { Vec::from_raw_parts(first, count, count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_zeros_where_there_is_no_room() {
        assert_eq!(zeros(3).unwrap(), [0.0; 3]);
        for count in [usize::MAX, usize::MAX / 16] {
            assert!(zeros(count).is_none());
        }
    }
}
