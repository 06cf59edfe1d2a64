//! Running sequences. Each owns a slot of the KV cache and its positions there.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
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
    /// [`Error::Prompt`] when the cache is too short; nothing has changed
    /// then.
    pub fn append(&mut self, tokens: &[u32]) -> Result<Range<usize>> {
        let positions = self.kv.begin(tokens.len())?;
        self.tokens.extend(tokens);
        Ok(positions)
    }

    /// Go on as another sequence that begins with the first `length` tokens, which every layer holds.
    /// Caches of layers that its tokens skip get what `kv_fill` says.
    ///
    /// # Panics
    /// When a layer does not hold them.
    pub fn reuse(&mut self, length: usize, kv_fill: KvFill) {
        assert!(length <= self.complete(), "positions that a layer lacks");
        self.truncate(length);
        self.kv_fill = kv_fill;
    }

    /// Begin as `other` does: every layer holds its first `length` tokens.
    ///
    /// # Errors
    /// [`Error::Prompt`] when the cache is too short.
    pub(crate) fn begin_as(&mut self, other: &Self, length: usize) -> Result<()> {
        let positions = self.append(&other.tokens[..length])?;
        (0..self.kv.layers()).for_each(|layer| self.kv.fill(layer, positions.end));
        Ok(())
    }

    /// The number of first positions that every layer holds.
    pub fn complete(&self) -> usize {
        self.kv.complete()
    }

    /// Forget all positions from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.kv.truncate(length);
        self.tokens.truncate(length);
    }
}

/// The cache slots of a backend.
#[derive(Debug, Clone)]
pub struct Slots {
    free: Arc<Mutex<Vec<usize>>>,
    count: usize,
}

impl Slots {
    /// `count` free slots.
    pub fn new(count: usize) -> Self {
        let free = Arc::new(Mutex::new((0..count).rev().collect()));
        Self { free, count }
    }

    /// Start a sequence in a free slot; see [`Sequence::new`].
    ///
    /// # Errors
    /// [`Error::Setting`] when every slot is taken.
    pub fn open(&self, layers: usize, capacity: usize, kv_fill: KvFill) -> Result<Sequence> {
        let slot = self.take().ok_or_else(|| {
            let count = self.count;
            let range = format!("at most the backend's {count} at once; end another first");
            Error::setting("sequences", count + 1, range)
        })?;
        Ok(Sequence::new(slot, layers, capacity, kv_fill))
    }

    /// Have `count` slots, where there are fewer.
    pub fn grow(&mut self, count: usize) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // the lowest is taken first
        free.splice(0..0, (self.count..count).rev());
        drop(free);
        self.count = self.count.max(count);
    }

    /// The number of slots that are taken.
    pub fn taken(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        self.count - free.len()
    }

    /// Take a free slot, if there is one.
    pub fn take(&self) -> Option<Slot> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = free.pop()?;
        drop(free);
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
        let slots = &self.slots.free;
        let mut free = slots.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_sequence_gives_its_slot_back() {
        let slots = Slots::new(2);
        let open = || slots.open(1, 4, KvFill::Defer);
        let (first, second) = (open().unwrap(), open().unwrap());
        assert_eq!((first.slot(), second.slot()), (0, 1));
        let error = open().unwrap_err().to_string();
        assert!(error.contains("at most the backend's 2 at once"), "{error}");
        drop(first);
        assert_eq!(open().unwrap().slot(), 0);
    }

    #[test]
    fn slots_are_added() {
        let mut slots = Slots::new(1);
        let first = slots.take();
        slots.grow(3);
        slots.grow(2);
        assert_eq!(slots.taken(), 1);
        let others = [slots.take().unwrap(), slots.take().unwrap()];
        assert_eq!(others.each_ref().map(|slot| slot.index), [1, 2]);
        assert!(slots.take().is_none());
        drop(first);
        assert_eq!(slots.taken(), 2);
    }

    #[test]
    fn a_sequence_goes_on_from_what_every_layer_holds() {
        let slots = Slots::new(1);
        let mut sequence = slots.open(2, 4, KvFill::Propagate).unwrap();
        sequence.append(&[7, 8, 9]).unwrap();
        sequence.kv_mut().fill(0, 3);
        sequence.kv_mut().fill(1, 2);
        assert_eq!(sequence.complete(), 2);
        sequence.reuse(1, KvFill::Defer);
        assert_eq!(sequence.tokens(), [7]);
        assert_eq!(sequence.kv_fill(), KvFill::Defer);
    }
}
