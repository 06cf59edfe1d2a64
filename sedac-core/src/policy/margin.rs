//! Stop where the likeliest token leads clearly.

use super::{ExitReason, Policy, Signals, Thresholds};

/// Stops a token where the exit engine's margin reaches the depth's threshold.
#[derive(Debug)]
pub struct Margin {
    thresholds: Thresholds,
}

impl Margin {
    /// Stop after the depths of `thresholds`, which the margin must reach.
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds }
    }
}

impl Policy for Margin {
    fn begin(&mut self) {}

    fn reads_exit(&self, depth: usize) -> bool {
        self.thresholds.get(depth).is_some()
    }

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        let threshold = self.thresholds.get(depth)?;
        (signals.exit?.margin >= threshold).then_some(ExitReason::Margin)
    }
}
