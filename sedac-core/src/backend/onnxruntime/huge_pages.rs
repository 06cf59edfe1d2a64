//! The memory of ONNX Runtime's sessions on the CPU and of the chain's own operators, in huge pages where the
//! system has them.
//!
//! A decode step reads all weights once. Packed for the kernels, they are in memory that ONNX
//! Runtime or an operator allocates. With pages of 4 KiB, translating their addresses makes a step a tenth
//! longer.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;

use libmimalloc_sys::{mi_free, mi_malloc_aligned};
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::{AsPointer, sys};

/// What kernels want their buffers aligned to.
const ALIGNMENT: usize = 64;

/// mimalloc, as ONNX Runtime calls allocators. It takes memory from the system in large pieces and
/// asks for huge pages in them.
///
/// Nothing is freed of it: the environment may outlive whatever could own it.
#[repr(C)]
struct HugePages {
    interface: sys::OrtAllocator,
    info: MemoryInfo<'static>,
}

/// Have the sessions of `environment` that use its allocators allocate in huge pages.
pub(super) fn register(environment: &Environment) -> ort::Result<()> {
    let cpu = AllocationDevice::CPU;
    let info = MemoryInfo::new(cpu, 0, AllocatorType::Device, MemoryType::Default)?;
    let interface = sys::OrtAllocator {
        version: sys::ORT_API_VERSION,
        Alloc: Some(allocate),
        Free: Some(free),
        Info: Some(info_of),
        Reserve: Some(reserve),
        GetStats: None,
        AllocOnStream: None,
        Shrink: None,
    };
    let allocator = Box::into_raw(Box::new(HugePages { interface, info }));
    // SAFETY: both pointers are live, and `allocator`, whose first field is what is asked for, stays
    // so. Its functions may be called by any thread. The status goes to `result_from_status` once.
    unsafe {
        let register = ort::api().RegisterAllocator;
        let environment = environment.ptr().cast_mut();
        ort::Error::result_from_status(register(environment, allocator.cast()))
    }
}

unsafe extern "system" fn allocate(_: *mut sys::OrtAllocator, size: usize) -> *mut c_void {
    // SAFETY: mimalloc takes any size, and the alignment is a power of two.
    unsafe { mi_malloc_aligned(size, ALIGNMENT) }
}

unsafe extern "system" fn reserve(_: *const sys::OrtAllocator, size: usize) -> *mut c_void {
    // SAFETY: as in `allocate`.
    unsafe { mi_malloc_aligned(size, ALIGNMENT) }
}

unsafe extern "system" fn free(_: *mut sys::OrtAllocator, memory: *mut c_void) {
    // SAFETY: ONNX Runtime gives back, once, what it got of `allocate` or `reserve`.
    unsafe { mi_free(memory) }
}

unsafe extern "system" fn info_of(this: *const sys::OrtAllocator) -> *const sys::OrtMemoryInfo {
    // SAFETY: `this` points to a whole `HugePages`, made in `register`.
    unsafe { (*this.cast::<HugePages>()).info.ptr() }
}

/// Numbers, or arrays of them, in huge pages.
pub(super) struct HugeSlice<T> {
    first: NonNull<T>,
    count: usize,
}

impl<T: Copy> HugeSlice<T> {
    /// As many of `value` as `count`; None where the system has no room for them.
    pub(super) fn filled(value: T, count: usize) -> Option<Self> {
        const { assert!(align_of::<T>() <= ALIGNMENT) };
        let size = size_of::<T>().checked_mul(count)?;
        // SAFETY: as in `allocate`.
        let first = unsafe { mi_malloc_aligned(size, ALIGNMENT) };
        let first = NonNull::new(first.cast::<T>())?;
        for index in 0..count {
            // SAFETY: there is room for `count`, and it is aligned.
            unsafe { first.add(index).write(value) };
        }
        Some(Self { first, count })
    }
}

impl<T> Deref for HugeSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `filled` has written as many, which are this value's alone.
        unsafe { slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl<T> DerefMut for HugeSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { slice::from_raw_parts_mut(self.first.as_ptr(), self.count) }
    }
}

impl<T> Drop for HugeSlice<T> {
    fn drop(&mut self) {
        // SAFETY: mimalloc gave the memory, and what is in it needs no drop: `filled` takes what can be
        // copied.
        unsafe { mi_free(self.first.as_ptr().cast()) };
    }
}

// SAFETY: it owns what it holds, as a vector does.
unsafe impl<T: Send> Send for HugeSlice<T> {}
// SAFETY: shared, it gives shared slices alone.
unsafe impl<T: Sync> Sync for HugeSlice<T> {}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn memory_is_aligned_for_kernels() {
        for size in [0, 1, 4096, 3 << 20] {
            // SAFETY: `allocate` and `free` do not read their first argument, and what is freed
            // comes from `allocate`.
            unsafe {
                let memory = allocate(ptr::null_mut(), size);
                assert!(!memory.is_null());
                assert_eq!(memory.addr() % ALIGNMENT, 0);
                free(ptr::null_mut(), memory);
            }
        }
    }
    #[test]
    fn slices_hold_what_is_written() {
        let mut slice = HugeSlice::filled([7_u16; 3], 5).unwrap();
        slice[4][1] = 8;
        assert_eq!(
            *slice,
            [[7, 7, 7], [7, 7, 7], [7, 7, 7], [7, 7, 7], [7, 8, 7]]
        );
        assert_eq!(slice.as_ptr().addr() % ALIGNMENT, 0);
        assert!(HugeSlice::filled(0_u64, usize::MAX / 4).is_none());
        assert!(HugeSlice::filled(0_u64, 0).unwrap().is_empty());
    }
}
