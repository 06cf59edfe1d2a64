//! V6.1: stop when confidence has gathered over the probes.

use super::{ByDepth, ExitReason, Policy, Signals, Thresholds};

/// Stops a token where the confidence C reaches the depth's target. At each probe,
/// C = C * decay + clamp((threshold - risk) / threshold, 0, 1) * weight.
#[derive(Debug)]
pub struct Cascade {
    decay: f32,
    thresholds: Thresholds,
    weights: ByDepth,
    targets: ByDepth,
    soft: bool,
    confidence: f32,
}

impl Cascade {
    /// Thresholds (above 0), weights and targets are those of the same depths. A `soft` exit skips
    /// MLPs only.
    pub fn new(
        decay: f32,
        thresholds: Thresholds,
        weights: ByDepth,
        targets: ByDepth,
        soft: bool,
    ) -> Self {
        Self {
            decay,
            thresholds,
            weights,
            targets,
            soft,
            confidence: 0.0,
        }
    }
}

impl Policy for Cascade {
    fn begin(&mut self) {
        self.confidence = 0.0;
    }

    fn skipped_share(&self) -> Option<f32> {
        self.soft
            .then(|| (2.0 * self.confidence - 1.0).tanh() / 2.0 + 0.5)
    }

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        let threshold = self.thresholds.get(depth)?;
        let gained = ((threshold - signals.risk?) / threshold).clamp(0.0, 1.0);
        self.confidence = self.confidence * self.decay + gained * self.weights.get(&depth)?;
        (self.confidence >= *self.targets.get(&depth)?).then_some(ExitReason::Cascade)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cascade() -> Cascade {
        let by_depth = |low, high| ByDepth::from([(2, low), (4, high)]);
        Cascade::new(
            0.5,
            Thresholds::new(&by_depth(1.0, 2.0)),
            by_depth(1.0, 0.5),
            by_depth(0.9, 0.6),
            true,
        )
    }

    fn risky(risk: f32) -> Signals {
        Signals {
            risk: Some(risk),
            ..Signals::default()
        }
    }

    #[test]
    fn confidence_decays_and_gathers() {
        let mut policy = cascade();
        policy.begin();
        assert_eq!(policy.observe(2, risky(0.2)), None);
        assert_eq!(policy.confidence, 0.8);
        assert_eq!(policy.observe(3, risky(0.0)), None);
        // 0.8 * 0.5 + 1 / 2 * 0.5
        assert_eq!(policy.observe(4, risky(1.0)), Some(ExitReason::Cascade));
        // tanh(2 * 0.65 - 1) / 2 + 1 / 2
        assert!((policy.skipped_share().unwrap() - 0.645_656).abs() < 1e-5);
        policy.begin();
        assert_eq!(policy.observe(4, risky(1.0)), None);
    }

    #[test]
    fn nothing_is_gained_from_much_risk_or_nan() {
        let mut policy = cascade();
        policy.begin();
        assert_eq!(policy.observe(2, risky(9.0)), None);
        assert_eq!(policy.confidence, 0.0);
        assert_eq!(policy.observe(4, risky(f32::NAN)), None);
    }
}
