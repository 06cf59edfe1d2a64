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

    /// The sequence whose first tokens `decoding` begins with, the longest such, cut off there. Where
    /// most of a sequence would be lost, that is only done when `all_taken`: no slot is free.
    pub(super) fn take(&mut self, decoding: &Decoding, all_taken: bool) -> Option<Sequence> {
        let wanted = decoding.reusable();
        let common = |sequence: &Sequence| common_prefix(sequence.tokens(), wanted);
        let worthwhile = |sequence: &Sequence| {
            let length = common(sequence);
            length > 0 && (all_taken || 2 * length >= sequence.tokens().len())
        };
        let candidates = self.ended.iter().enumerate();
        let candidates = candidates.filter(|(_, sequence)| worthwhile(sequence));
        let (index, _) = candidates.max_by_key(|(_, sequence)| common(sequence))?;
        let mut sequence = self.ended.remove(index)?;
        sequence.reuse(common(&sequence), decoding.kv_fill());
        Some(sequence)
    }

    /// Free the slot of the sequence that ended first. False where there is none.
    pub(super) fn evict(&mut self) -> bool {
        self.ended.pop_front().is_some()
    }
}

fn common_prefix(ours: &[u32], theirs: &[u32]) -> usize {
    let pairs = ours.iter().zip(theirs);
    pairs.take_while(|(ours, theirs)| ours == theirs).count()
}
