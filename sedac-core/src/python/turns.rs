//! One model for several generations, one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::chain::Chain;

/// A chain that callers use in turns.
pub(super) struct Turns {
    chain: Mutex<Chain>,
    waiting: AtomicUsize,
}

impl Turns {
    pub(super) fn new(chain: Chain) -> Self {
        Self {
            chain: Mutex::new(chain),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Wait for a turn, which ends when what is returned is dropped.
    pub(super) fn take(&self) -> MutexGuard<'_, Chain> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // a generation that panicked leaves nothing behind that the next one does not reset
        let chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        chain
    }

    /// Whether somebody waits.
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}
