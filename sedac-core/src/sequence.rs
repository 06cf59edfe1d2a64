//! Running sequences. Each owns a slot of the KV cache and its positions there.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::kv::{KvFill, KvState};

/// A running sequence: its tokens so far and what each layer's KV cache holds of them.
///
/// Dropping it gives its cache slot back.
#[derive(Debug)]
pub struct Sequence {
    slot: Slot,
    kv: KvState,
    kv_fill: KvFill,
    tokens: Vec<u32>,
}

impl Sequence {
    /// An empty sequence in `slot`, for a model of `layers` layers with caches of `capacity`
    /// positions. Caches of layers that a token skips get what `kv_fill` says.
    pub fn new(slot: Slot, layers: usize, capacity: usize, kv_fill: KvFill) -> Self {
        Self {
            slot,
            kv: KvState::new(layers, capacity),
            kv_fill,
            tokens: Vec::new(),
        }
    }

    /// The index of its cache slot.
    pub fn slot(&self) -> usize {
        self.slot.index
    }

    /// What the caches of skipped layers get.
    pub fn kv_fill(&self) -> KvFill {
        self.kv_fill
    }

    /// The tokens so far, one for each position.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Which positions each layer's cache holds.
    pub fn kv(&self) -> &KvState {
        &self.kv
    }

    /// The same, for backends to update.
    pub fn kv_mut(&mut self) -> &mut KvState {
        &mut self.kv
    }

    /// Positions that are still free.
    pub fn room(&self) -> usize {
        self.kv.room()
    }

    /// Append `tokens` and return their positions.
    ///
    /// # Errors
    /// [`Error::Prompt`](crate::Error::Prompt) when the cache is too short; nothing has changed
    /// then.
    pub fn append(&mut self, tokens: &[u32]) -> Result<Range<usize>> {
        let positions = self.kv.begin(tokens.len())?;
        self.tokens.extend(tokens);
        Ok(positions)
    }

    /// Forget all positions from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.kv.truncate(length);
        self.tokens.truncate(length);
    }
}

/// The cache slots of a backend.
#[derive(Debug, Clone)]
pub struct Slots(Arc<Mutex<Vec<usize>>>);

impl Slots {
    /// `count` free slots.
    pub fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new((0..count).rev().collect())))
    }

    /// Take a free slot, if there is one.
    pub fn take(&self) -> Option<Slot> {
        let index = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()?;
        Some(Slot {
            index,
            slots: self.clone(),
        })
    }
}

/// A cache slot; free again when dropped.
#[derive(Debug)]
pub struct Slot {
    index: usize,
    slots: Slots,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut free = self.slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_sequence_gives_its_slot_back() {
        let slots = Slots::new(2);
        let open = || Some(Sequence::new(slots.take()?, 1, 4, KvFill::Defer));
        let (first, second) = (open().unwrap(), open().unwrap());
        assert_eq!((first.slot(), second.slot()), (0, 1));
        assert!(open().is_none());
        drop(first);
        assert_eq!(open().unwrap().slot(), 0);
    }
}
