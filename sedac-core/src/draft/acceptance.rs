//! How often drafted tokens were accepted.

/// Observations decay by this with every round: text changes, and what did not pay may pay again.
const DECAY: f64 = 0.999;
/// The prior counts as much as this number of drafted tokens.
const PRIOR_WEIGHT: f64 = 2.0;

/// The acceptance rate of drafted tokens of one kind, older ones counting less.
#[derive(Debug, Clone, Copy)]
pub(super) struct AcceptanceRate {
    prior: f64,
    accepted: f64,
    drafted: f64,
}

impl AcceptanceRate {
    /// Nothing observed yet: the estimate is `prior`.
    pub(super) fn new(prior: f64) -> Self {
        Self {
            prior,
            accepted: 0.0,
            drafted: 0.0,
        }
    }

    pub(super) fn estimate(&self) -> f64 {
        (self.accepted + self.prior * PRIOR_WEIGHT) / (self.drafted + PRIOR_WEIGHT)
    }

    pub(super) fn observe(&mut self, accepted: bool) {
        self.accepted += f64::from(u8::from(accepted));
        self.drafted += 1.0;
    }

    /// A round has passed.
    pub(super) fn decay(&mut self) {
        self.accepted *= DECAY;
        self.drafted *= DECAY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_outweigh_the_prior_until_they_decay() {
        let mut rate = AcceptanceRate::new(0.8);
        assert_eq!(rate.estimate(), 0.8);
        for _ in 0..6 {
            rate.observe(false);
        }
        assert!((rate.estimate() - 0.2).abs() < 1e-9);
        for _ in 0..8000 {
            rate.decay();
        }
        assert!(rate.estimate() > 0.79);
    }
}
