//! Exit at prescribed depths: measures the machinery, whatever the model says.

use super::{ExitReason, Policy, Signals};

/// Stops the n-th token after `depths[n % depths.len()]` layers.
#[derive(Debug, Clone)]
pub struct Forced {
    depths: Vec<usize>,
    next: usize,
    current: usize,
}

impl Forced {
    /// Stop after each of `depths` in turn, over and over. `depths` must not be empty.
    pub fn new(depths: Vec<usize>) -> Self {
        assert!(!depths.is_empty(), "no depth to exit at");
        Self {
            depths,
            next: 0,
            current: 0,
        }
    }
}

impl Policy for Forced {
    fn begin(&mut self) {
        self.current = self.depths[self.next];
        self.next = (self.next + 1) % self.depths.len();
    }

    fn observe(&mut self, depth: usize, _: Signals) -> Option<ExitReason> {
        (depth >= self.current).then_some(ExitReason::Forced)
    }
}
