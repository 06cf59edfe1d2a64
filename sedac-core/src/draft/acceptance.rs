//! How often drafted tokens were accepted.

use serde::{Deserialize, Serialize};

/// Observations decay by this with every round: text changes, and what did not pay may pay again.
const DECAY: f64 = 0.999;
/// The prior counts as much as this number of drafted tokens.
const PRIOR_WEIGHT: f64 = 4.0;

/// What drafters observed in texts of one bundle, to start with in others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Acceptance {
    /// Acceptance rates of prompt lookup, by class.
    pub prompt_lookup: Vec<f64>,
    /// Of early exit, by depth.
    pub early_exit: Vec<DepthAcceptance>,
    /// Of the trained drafter, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained: Option<TrainedAcceptance>,
}

/// What was observed of a trained drafter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainedAcceptance {
    /// Rounds, newer ones counting more.
    pub rounds: f64,
    /// Tokens that these gave.
    pub tokens: f64,
    /// Tokens that were drafted.
    pub drafted: f64,
    /// Tokens of the passes that verified them.
    pub verified: f64,
    /// Acceptance rates by the probability of the drafted token.
    pub rates: Vec<f64>,
}

/// What was observed of drafts to one depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DepthAcceptance {
    /// Layers.
    pub depth: usize,
    /// What the tokens of rounds cost without drafts, relative to full depth.
    pub baseline: f64,
    /// What the rounds cost, likewise.
    pub cost: f64,
    /// Acceptance rates by margin.
    pub rates: Vec<f64>,
}

impl Acceptance {
    /// Whether all rates are probabilities, and all costs are finite and not negative.
    pub(crate) fn is_sound(&self) -> bool {
        let depths = || self.early_exit.iter();
        let trained = || self.trained.iter();
        let rates = depths().flat_map(|depth| &depth.rates);
        let rates = rates.chain(trained().flat_map(|trained| &trained.rates));
        let costs = depths().flat_map(|depth| [depth.baseline, depth.cost]);
        let mut costs = costs.chain(trained().flat_map(|of| {
            let TrainedAcceptance {
                rounds,
                tokens,
                drafted,
                verified,
                ..
            } = of;
            [*rounds, *tokens, *drafted, *verified]
        }));
        let mut rates = rates.chain(&self.prompt_lookup);
        rates.all(|rate| (0.0..=1.0).contains(rate))
            && costs.all(|cost| (0.0..f64::MAX).contains(&cost))
    }
}

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

    /// Other texts had the rate `remembered`. It changes the prior by a half only: what was rarely
    /// accepted there is tried again here.
    pub(super) fn recall(&mut self, remembered: f64) {
        self.prior = f64::midpoint(self.prior, remembered);
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
        for _ in 0..12 {
            rate.observe(false);
        }
        assert!((rate.estimate() - 0.2).abs() < 1e-9);
        for _ in 0..8000 {
            rate.decay();
        }
        assert!(rate.estimate() > 0.79);
    }

    #[test]
    fn remembered_rates_are_a_weak_prior() {
        let mut rate = AcceptanceRate::new(0.8);
        rate.recall(0.0);
        assert_eq!(rate.estimate(), 0.4);
        (0..4).for_each(|_| rate.observe(true));
        assert_eq!(rate.estimate(), 0.7);
    }

    #[test]
    fn rates_are_probabilities() {
        let of = |rate, cost| Acceptance {
            prompt_lookup: vec![0.5],
            early_exit: vec![DepthAcceptance {
                depth: 1,
                baseline: 1.0,
                cost,
                rates: vec![rate],
            }],
            trained: None,
        };
        assert!(of(1.0, 2.0).is_sound());
        for (rate, cost) in [
            (1.1, 2.0),
            (f64::NAN, 2.0),
            (0.5, -1.0),
            (0.5, f64::INFINITY),
        ] {
            assert!(!of(rate, cost).is_sound(), "{rate} {cost}");
        }
    }
}
