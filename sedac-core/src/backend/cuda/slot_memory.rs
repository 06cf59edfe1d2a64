//! GPU memory of cache slots.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::abi::LayerPointers;
use super::memory::zeros;
use crate::backend::gpu::failed;
use crate::error::Result;

/// Bytes of a number in caches.
const HALF: u64 = 2;

/// What slots take.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotSizes {
    pub(super) slots: usize,
    /// Positions of each.
    pub(super) capacity: usize,
    pub(super) layers: usize,
    pub(super) key_value_heads: usize,
    pub(super) head_size: usize,
    /// Bytes of the hidden states that are saved of a position.
    pub(super) saved_bytes: u64,
}

impl SlotSizes {
    /// The same, of so many slots.
    pub(super) fn with(self, slots: usize) -> Self {
        Self { slots, ..self }
    }

    /// Bytes of the keys, or values, of one position and key-value head.
    fn position(&self) -> u64 {
        self.head_size as u64 * HALF
    }

    /// Of one key-value head of a slot.
    fn head(&self) -> u64 {
        self.position() * self.capacity as u64
    }

    /// Of one slot.
    fn slot(&self) -> u64 {
        self.head() * self.key_value_heads as u64
    }

    /// Of one layer.
    fn cache(&self) -> u64 {
        self.slot() * self.slots as u64
    }

    fn saved(&self) -> u64 {
        self.saved_bytes * (self.capacity * self.slots) as u64
    }

    /// Bytes of everything.
    pub(super) fn total(&self) -> u64 {
        2 * self.layers as u64 * self.cache() + self.saved()
    }
}

/// What the sequences of all slots have, and where the kernel finds it.
pub(super) struct SlotMemory {
    pub(super) sizes: SlotSizes,
    /// Of each layer, keys and values: [slot, key-value heads, capacity, head size].
    caches: Vec<CudaSlice<u8>>,
    /// Hidden states at exits.
    pub(super) saved: CudaSlice<u8>,
    /// The layers' addresses, these caches' among them.
    pub(super) layers: CudaSlice<LayerPointers>,
}

impl SlotMemory {
    /// Allocate what `sizes` says, and write where it lies to `layers`.
    pub(super) fn allocate(
        stream: &Arc<CudaStream>,
        sizes: SlotSizes,
        layers: &mut [LayerPointers],
    ) -> Result<Self> {
        let mut caches = Vec::new();
        for layer in layers.iter_mut() {
            for pointer in [&mut layer.keys, &mut layer.values] {
                let cache = zeros(stream, sizes.cache())?;
                *pointer = cache.device_ptr(stream).0;
                caches.push(cache);
            }
        }
        let saved = zeros(stream, sizes.saved())?;
        let copied = stream.clone_htod(layers);
        // `layers` are read until then, also where the call failed
        let waited = stream.synchronize();
        let copied = copied.and_then(|copied| waited.map(|()| copied));
        Ok(Self {
            sizes,
            caches,
            saved,
            layers: copied.map_err(failed("a copy of the layers' addresses to the GPU"))?,
        })
    }

    /// Copy the first `length` positions of the caches of the slot `from` to those of `to`.
    ///
    /// # Panics
    /// When both are the same slot, or there are no such slots or positions.
    pub(super) fn copy(
        &mut self,
        stream: &Arc<CudaStream>,
        from: usize,
        length: usize,
        to: usize,
    ) -> Result<()> {
        let (slot, head) = (self.sizes.slot() as usize, self.sizes.head() as usize);
        let bytes = self.sizes.position() as usize * length;
        assert!(bytes <= head && from != to, "what is copied");
        for cache in &mut self.caches {
            for start in (0..slot).step_by(head) {
                let (from, to) = (from * slot + start, to * slot + start);
                copy_within(stream, cache, from, to, bytes)?;
            }
        }
        Ok(())
    }

    /// Overwrite the caches of `slot` with zeros.
    pub(super) fn clear(&mut self, stream: &Arc<CudaStream>, slot: usize) -> Result<()> {
        let bytes = self.sizes.slot() as usize;
        for cache in &mut self.caches {
            let mut slot = cache.slice_mut(slot * bytes..(slot + 1) * bytes);
            let cleared = stream.memset_zeros(&mut slot);
            cleared.map_err(failed("a cache of the GPU"))?;
        }
        Ok(())
    }
}

/// Copy `bytes` bytes of `memory` from the place `from` to `to`.
///
/// # Panics
/// When these overlap, or do not lie in it.
pub(super) fn copy_within(
    stream: &Arc<CudaStream>,
    memory: &mut CudaSlice<u8>,
    from: usize,
    to: usize,
    bytes: usize,
) -> Result<()> {
    let (first, second) = (from.min(to), from.max(to));
    let (mut below, mut above) = memory.split_at_mut(second);
    let mut low = below.slice_mut(first..first + bytes);
    let mut high = above.slice_mut(..bytes);
    let copied = match from < to {
        true => stream.memcpy_dtod(&low, &mut high),
        false => stream.memcpy_dtod(&high, &mut low),
    };
    copied.map_err(failed("a copy within the GPU's memory"))
}
