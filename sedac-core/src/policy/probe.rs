//! V6: stop where a trained probe sees little risk.

use super::{ExitReason, Policy, Signals, Thresholds};

/// Stops a token where the entropy probe's risk is below the depth's threshold.
#[derive(Debug)]
pub struct Probe {
    thresholds: Thresholds,
}

impl Probe {
    /// Stop after the depths of `thresholds`, below which the risk must be.
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds }
    }
}

impl Policy for Probe {
    fn begin(&mut self) {}

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        let threshold = self.thresholds.get(depth)?;
        (signals.risk? < threshold).then_some(ExitReason::Probe)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ByDepth;
    use super::*;

    #[test]
    fn only_a_risk_below_the_threshold_of_its_depth_stops() {
        let mut policy = Probe::new(Thresholds::new(&ByDepth::from([(2, 0.5)])));
        let mut stops = |depth, risk| {
            let signals = Signals {
                risk,
                ..Signals::default()
            };
            policy.observe(depth, signals).is_some()
        };
        assert!(stops(2, Some(0.4)));
        assert!(!stops(2, Some(0.5)));
        assert!(!stops(3, Some(0.4)));
        assert!(!stops(2, None));
        assert!(!stops(2, Some(f32::NAN)));
    }
}
