//! Stop where a trained probe expects the token of full depth.

use super::{ExitReason, Policy, Signals, Thresholds};

/// Stops a token where the probability that it is full depth's reaches the depth's threshold.
#[derive(Debug)]
pub struct Learned {
    thresholds: Thresholds,
}

impl Learned {
    /// Stop after the depths of `thresholds`, which the probability must reach.
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds }
    }
}

impl Policy for Learned {
    fn begin(&mut self) {}

    fn reads_exit(&self, depth: usize) -> bool {
        self.thresholds.get(depth).is_some()
    }

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        let threshold = self.thresholds.get(depth)?;
        (signals.exit?.learned >= threshold).then_some(ExitReason::Learned)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ByDepth, ExitSignals, Margin};
    use super::*;

    #[test]
    fn each_policy_reads_its_own_signal_at_its_own_depths() {
        let signals = |margin, learned| Signals {
            exit: Some(ExitSignals {
                margin,
                entropy: 0.0,
                learned,
            }),
            ..Signals::default()
        };
        let thresholds = ByDepth::from([(4, 0.9)]);
        let mut margin = Margin::new(Thresholds::new(&thresholds));
        let mut learned = Learned::new(Thresholds::new(&thresholds));
        assert_eq!(
            margin.observe(4, signals(0.9, 0.0)),
            Some(ExitReason::Margin)
        );
        assert_eq!(learned.observe(4, signals(0.9, 0.0)), None);
        assert_eq!(
            learned.observe(4, signals(0.0, 0.9)),
            Some(ExitReason::Learned)
        );
        assert_eq!(learned.observe(5, signals(1.0, 1.0)), None);
        assert_eq!(learned.observe(4, signals(f32::NAN, f32::NAN)), None);
        assert_eq!(learned.observe(4, Signals::default()), None);
        assert!(margin.reads_exit(4) && !margin.reads_exit(5));
    }
}
