//! Caches of sequences that have ended, for others that begin with the same tokens.

use std::collections::VecDeque;

use crate::chain::Decoding;
use crate::sequence::Sequence;

/// Ended sequences in their slots, the one that ended first in front.
#[derive(Default)]
pub(super) struct PrefixCache {
    ended: VecDeque<Sequence>,
}

impl PrefixCache {
    /// The number of them.
    pub(super) fn len(&self) -> usize {
        self.ended.len()
    }

    /// Positions of all of them.
    pub(super) fn tokens(&self) -> usize {
        let lengths = self.ended.iter().map(|sequence| sequence.tokens().len());
        lengths.sum()
    }

    /// Keep what another sequence may continue of the one that `decoding` had.
    pub(super) fn keep(&mut self, decoding: &Decoding, mut sequence: Sequence) {
        let length = decoding.exact(sequence.complete());
        sequence.reuse(length, sequence.kv_fill());
        if length > 0 {
            self.ended.push_back(sequence);
        }
    }

    /// Take the sequence that shares the longest beginning with `decoding`, cut off there, of those
    /// that share at least `min_length` tokens, 1 or more, and the share `min_kept` of their own.
    pub(super) fn take(
        &mut self,
        decoding: &Decoding,
        min_length: usize,
        min_kept: f64,
    ) -> Option<Sequence> {
        let wanted = decoding.reusable();
        let lengths = self.ended.iter().enumerate().map(|(index, sequence)| {
            let own = sequence.tokens();
            (common_prefix(own, wanted), own.len(), index)
        });
        let candidates = lengths.filter(|&(length, own, _)| {
            length >= min_length.max(1) && length as f64 >= min_kept * own as f64
        });
        let (length, _, index) = candidates.max()?;
        let mut sequence = self.ended.remove(index)?;
        sequence.reuse(length, decoding.kv_fill());
        Some(sequence)
    }

    /// All sequences.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.ended.iter()
    }

    /// Free the slot of the sequence that ended first. False where there is none.
    pub(super) fn evict(&mut self) -> bool {
        self.ended.pop_front().is_some()
    }
}

/// The number of first tokens that both have.
pub(super) fn common_prefix(ours: &[u32], theirs: &[u32]) -> usize {
    let pairs = ours.iter().zip(theirs);
    pairs.take_while(|(ours, theirs)| ours == theirs).count()
}
