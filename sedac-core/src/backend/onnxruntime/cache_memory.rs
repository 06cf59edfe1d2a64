//! The KV caches of all slots, of which engines see those of one slot or of all.

use std::ops::Range;

use ort::session::{IoBinding, Session};
use ort::value::Outlet;

use super::host_memory::HostMemory;
use super::runtime::{Side, bind_memory, engine_error};
use crate::bundle::Manifest;
use crate::error::{Error, Result};

/// Caches of as many sequences as there are slots.
pub(super) struct CacheMemory {
    slots: usize,
    /// Keys and values of each layer.
    layers: Vec<[Cache; 2]>,
}

/// [slots, heads, positions, head size]. A short text leaves most of it out.
struct Cache {
    memory: HostMemory,
    heads: usize,
    positions: usize,
    head_size: usize,
}

impl CacheMemory {
    /// Caches of zeros for `slots` sequences of the bundle of `manifest`.
    pub(super) fn new(manifest: &Manifest, slots: usize) -> Result<Self> {
        let positions = manifest.max_cache_length;
        let layers = manifest.key_value_heads.iter().map(|kv| {
            let cache = || Cache::new(slots, kv.heads, positions, kv.head_size);
            Ok([cache()?, cache()?])
        });
        Ok(Self {
            slots,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Take the caches of `fewer` slots as those of the first ones.
    pub(super) fn copy_from(&mut self, fewer: &Self) {
        for (ours, theirs) in self.layers.iter_mut().zip(&fewer.layers) {
            for (ours, theirs) in ours.iter_mut().zip(theirs) {
                let numbers = &theirs.memory.numbers()[..theirs.size(fewer.slots)];
                ours.memory.numbers_mut()[..numbers.len()].copy_from_slice(numbers);
            }
        }
    }

    /// Copy the first `length` positions of the slot `from` to those of `to`.
    pub(super) fn copy(&mut self, from: usize, length: usize, to: usize) {
        for cache in self.layers.iter_mut().flatten() {
            let row = cache.positions * cache.head_size;
            let (heads, used) = (cache.heads, length * cache.head_size);
            let numbers = cache.memory.numbers_mut();
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
            let memory = cache.memory.tensor(cache.size(slots.start), &shape);
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
        Ok(Self {
            memory: HostMemory::new(numbers)?.ok_or_else(|| no_room(numbers))?,
            heads,
            positions,
            head_size,
        })
    }

    /// Numbers of `slots` sequences.
    fn size(&self, slots: usize) -> usize {
        slots * self.heads * self.positions * self.head_size
    }
}

fn no_room(count: usize) -> Error {
    let bytes = count.saturating_mul(size_of::<f32>());
    let source = ort::Error::new(format!(
        "no room for {bytes} bytes; ask for fewer sequences, or build with a smaller --max-cache-length"
    ));
    engine_error("a cache cannot be allocated".into(), source)
}
