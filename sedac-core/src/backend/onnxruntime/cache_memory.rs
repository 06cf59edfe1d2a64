//! The KV caches of all slots, of which engines see those of one or of several neighbours.

use std::alloc::{Layout, alloc_zeroed};
use std::ops::Range;

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::Outlet;

use super::runtime::{Memory, Side, bind_memory, engine_error, provider_error};
use crate::bundle::Manifest;
use crate::error::{Error, Result};

/// Caches of as many sequences as there are slots.
pub(super) struct CacheMemory {
    slots: usize,
    /// Keys and values of each layer.
    layers: Vec<[Cache; 2]>,
    info: MemoryInfo<'static>,
}

/// The bytes that kernels load at once.
const ALIGNMENT: usize = 64;

struct Cache {
    /// [slots, heads, positions, head size] from `start` on. The system gives memory where numbers are
    /// written, and a short text leaves most of it out.
    memory: Vec<f32>,
    /// The first number that is aligned.
    start: usize,
    /// Of its first number.
    address: u64,
    heads: usize,
    positions: usize,
    head_size: usize,
}

impl CacheMemory {
    /// Caches of zeros for `slots` sequences of the bundle of `manifest`.
    pub(super) fn new(manifest: &Manifest, slots: usize) -> Result<Self> {
        let positions = manifest.max_cache_length + manifest.precision.spare_positions();
        let layers = manifest.key_value_heads.iter().map(|kv| {
            let cache = || Cache::new(slots, kv.heads, positions, kv.head_size);
            Ok([cache()?, cache()?])
        });
        let device = AllocationDevice::CPU;
        let info = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default);
        Ok(Self {
            slots,
            layers: layers.collect::<Result<_>>()?,
            info: info.map_err(provider_error)?,
        })
    }

    /// Take the caches of `fewer` slots as those of the first ones.
    pub(super) fn copy_from(&mut self, fewer: &Self) {
        for (ours, theirs) in self.layers.iter_mut().zip(&fewer.layers) {
            for (ours, theirs) in ours.iter_mut().zip(theirs) {
                let numbers = &theirs.memory[theirs.start..][..theirs.size(fewer.slots)];
                ours.numbers()[..numbers.len()].copy_from_slice(numbers);
            }
        }
    }

    /// Copy the first `length` positions of the slot `from` to those of `to`.
    pub(super) fn copy(&mut self, from: usize, length: usize, to: usize) {
        for cache in self.layers.iter_mut().flatten() {
            let row = cache.positions * cache.head_size;
            let (heads, used) = (cache.heads, length * cache.head_size);
            let numbers = cache.numbers();
            for head in 0..heads {
                let start = |slot: usize| (slot * heads + head) * row;
                let source = start(from)..start(from) + used;
                numbers.copy_within(source, start(to));
            }
        }
    }

    /// Bind the cache of `layer` in `slots` as the `index`-th of `session`, input and output in the
    /// same memory.
    ///
    /// # Safety
    /// The binding runs while these caches live only, and not while something else uses these slots.
    pub(super) unsafe fn bind(
        &self,
        bound: &mut IoBinding,
        session: &Session,
        (layer, index): (usize, usize),
        slots: Range<usize>,
    ) -> Result<()> {
        assert!(slots.start < slots.end && slots.end <= self.slots, "slots");
        for (kind, cache) in ["key", "value"].into_iter().zip(&self.layers[layer]) {
            let shape = [slots.len(), cache.heads, cache.positions, cache.head_size];
            let slot_bytes = cache.size(1) * size_of::<f32>();
            let memory = Memory {
                info: &self.info,
                address: cache.address + (slots.start * slot_bytes) as u64,
                shape: &shape,
                bytes: slots.len() * slot_bytes,
            };
            let (past, present) = (
                format!("past_{kind}_{index}"),
                format!("present_{kind}_{index}"),
            );
            for (side, values, name) in [
                (Side::Input, session.inputs(), past),
                (Side::Output, session.outputs(), present),
            ] {
                if let Some(value) = values.iter().find(|value: &&Outlet| value.name() == name) {
                    // SAFETY: the slots are inside of the tensor, and what the caller promises.
                    unsafe { bind_memory(bound, side, value, &memory)? };
                }
            }
        }
        Ok(())
    }
}

impl Cache {
    fn new(slots: usize, heads: usize, positions: usize, head_size: usize) -> Result<Self> {
        let numbers = slots * heads * positions * head_size;
        let count = numbers + ALIGNMENT / size_of::<f32>();
        let mut memory = zeros(count).ok_or_else(|| no_room(count))?;
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Ok(Self {
            address: memory[start..].as_mut_ptr().expose_provenance() as u64,
            memory,
            start,
            heads,
            positions,
            head_size,
        })
    }

    fn numbers(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..]
    }

    /// Numbers of `slots` sequences.
    fn size(&self, slots: usize) -> usize {
        slots * self.heads * self.positions * self.head_size
    }
}

/// `count` zeros, 1 or more, which the system gives memory for where they are written. None where it
/// has no room for them; a vector would abort.
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

fn no_room(count: usize) -> Error {
    let bytes = count.saturating_mul(size_of::<f32>());
    let source = ort::Error::new(format!(
        "no room for {bytes} bytes; ask for fewer sequences, or build with a smaller --max-cache-length"
    ));
    engine_error("a cache cannot be allocated".into(), source)
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
