//! Which positions each layer's cache holds.
//!
//! A token that exits early leaves the deeper layers' caches without an entry. Filling them can
//! wait until a later token goes that deep: nothing reads them before, and all that wait are then
//! filled in one pass. Because a token that runs a layer first fills everything below its own
//! position there, the positions a layer still lacks are always its newest ones, so one counter a
//! layer says it all.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What the KV caches of skipped layers get.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvFill {
    /// Each skipped layer's keys and values, computed from the exit hidden state (CALM, Schuster
    /// et al. 2022, <https://arxiv.org/abs/2207.07061>).
    #[default]
    Propagate,
    /// What the layers themselves compute: the token waits at its exit, and joins the pass of the
    /// next token that goes deeper (as Bae et al. 2023 do, <https://arxiv.org/abs/2310.05424>).
    Defer,
}

impl KvFill {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Propagate, Self::Defer];

    /// The name used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Propagate => "propagate",
            Self::Defer => "defer",
        }
    }
}

/// How far each layer's cache is filled, for one sequence.
///
/// Layer l holds exactly one entry for each of the positions `0..filled(l)`, and none beyond;
/// `filled` never grows with depth.
///
/// ```
/// use sedac_core::kv::KvState;
///
/// # fn main() -> sedac_core::Result<()> {
/// let mut kv = KvState::new(2, 8);
/// let token = kv.begin(1)?;
/// kv.fill(0, token.end); // exits after one layer
/// let next = kv.begin(1)?;
/// kv.fill(0, next.end);
/// assert_eq!(kv.pending(1, next.end), 0..2); // the second layer lacks both
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct KvState {
    filled: Vec<usize>,
    length: usize,
    capacity: usize,
}

impl KvState {
    /// An empty state of `layers` caches that hold up to `capacity` positions each.
    pub fn new(layers: usize, capacity: usize) -> Self {
        Self {
            filled: vec![0; layers],
            length: 0,
            capacity,
        }
    }

    /// The number of caches.
    pub fn layers(&self) -> usize {
        self.filled.len()
    }

    /// Positions of the sequence so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Positions there is still room for.
    pub fn room(&self) -> usize {
        self.capacity - self.length
    }

    /// Positions that layer `layer` holds entries for: all below this.
    pub fn filled(&self, layer: usize) -> usize {
        self.filled[layer]
    }

    /// The number of first positions that every layer holds entries for.
    pub fn complete(&self) -> usize {
        // filled never grows with depth
        self.filled.last().copied().unwrap_or(self.length)
    }

    /// Check that `tokens` new positions fit.
    ///
    /// # Errors
    /// [`Error::Prompt`] when the cache is too short.
    pub fn check_room(&self, tokens: usize) -> Result<()> {
        if tokens > self.room() {
            return Err(Error::Prompt(format!(
                "needs {tokens} more positions where the cache has room for {}; shorten it or \
                 build the bundle with a larger --max-cache-length",
                self.room()
            )));
        }
        Ok(())
    }

    /// Make room for `tokens` new positions and return them.
    ///
    /// # Errors
    /// As [`check_room`](Self::check_room), and then nothing changes.
    pub fn begin(&mut self, tokens: usize) -> Result<Range<usize>> {
        self.check_room(tokens)?;
        let start = self.length;
        self.length += tokens;
        Ok(start..self.length)
    }

    /// Positions below `end` that `layer` lacks: those that exited above it.
    pub fn pending(&self, layer: usize, end: usize) -> Range<usize> {
        self.filled[layer].min(end)..end
    }

    /// Note that `layer` now holds entries for all positions below `end`.
    pub fn fill(&mut self, layer: usize, end: usize) {
        debug_assert!(end >= self.filled[layer] && end <= self.length);
        debug_assert!(layer == 0 || self.filled[layer - 1] >= end);
        self.filled[layer] = end;
    }

    /// Forget all positions from `length` on; their entries are overwritten by what comes next.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        for filled in &mut self.filled {
            *filled = (*filled).min(length);
        }
    }
}
