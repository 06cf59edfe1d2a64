//! How much rounds of drafts draft and verify, and how many tokens they give.
//!
//! What that costs depends on what else runs: a text alone, or one of many. So costs are applied when a
//! round is decided about, and not when it is over.

use super::round_costs::{DECAY, MAX_REMEMBERED, PRIOR_WEIGHT, idle_decay};

/// A round before anything was observed: two of three drafted tokens are accepted.
const PRIOR: RoundLength = RoundLength {
    tokens: 3.0,
    drafted: 3.0,
    verified: 4.0,
};

/// Of a round, or means of several.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct RoundLength {
    /// Tokens that it gave.
    pub(super) tokens: f64,
    /// Tokens that it drafted.
    pub(super) drafted: f64,
    /// Tokens of the pass that verified these.
    pub(super) verified: f64,
}

impl RoundLength {
    fn map2(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            tokens: f(self.tokens, other.tokens),
            drafted: f(self.drafted, other.drafted),
            verified: f(self.verified, other.verified),
        }
    }

    fn scaled(self, factor: f64) -> Self {
        self.map2(self, |value, _| factor * value)
    }
}

/// Sums over rounds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RoundLengths {
    pub(super) rounds: f64,
    pub(super) sums: RoundLength,
    /// The text's length when it was last asked for means.
    asked_at: Option<usize>,
}

impl RoundLengths {
    /// What a round is expected to be.
    pub(super) fn mean(&self) -> RoundLength {
        let sums = self
            .sums
            .map2(PRIOR, |sum, prior| sum + PRIOR_WEIGHT * prior);
        sums.scaled(1.0 / (self.rounds + PRIOR_WEIGHT))
    }

    /// Another text begins. Rounds of earlier ones count no more than those of earlier processes.
    pub(super) fn start(&mut self) {
        self.asked_at = None;
        self.recall(self.rounds, self.sums);
    }

    /// The text has `length` tokens. A pass may have given several.
    pub(super) fn idle(&mut self, length: usize) {
        let factor = idle_decay(&mut self.asked_at, length);
        self.decay(factor);
    }

    pub(super) fn observe(&mut self, round: RoundLength) {
        self.decay(DECAY);
        self.rounds += 1.0;
        self.sums = self.sums.map2(round, |sum, value| sum + value);
    }

    /// Start from what an earlier process observed.
    pub(super) fn recall(&mut self, rounds: f64, sums: RoundLength) {
        let scale = (MAX_REMEMBERED / rounds).min(1.0);
        (self.rounds, self.sums) = (scale * rounds, sums.scaled(scale));
    }

    fn decay(&mut self, factor: f64) {
        self.rounds *= factor;
        self.sums = self.sums.scaled(factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND: RoundLength = RoundLength {
        tokens: 4.0,
        drafted: 5.0,
        verified: 5.0,
    };

    #[test]
    fn means_go_from_the_prior_to_what_was_observed() {
        let mut lengths = RoundLengths::default();
        assert_eq!(lengths.mean(), PRIOR);
        for _ in 0..500 {
            lengths.observe(ROUND);
        }
        assert!((lengths.mean().tokens - 4.0).abs() < 0.2);
        let before = lengths.mean();
        lengths.idle(10);
        lengths.idle(2010);
        assert!(lengths.mean().drafted < before.drafted);
    }

    #[test]
    fn earlier_texts_weigh_no_more_than_some_rounds() {
        let mut lengths = RoundLengths::default();
        (0..500).for_each(|_| lengths.observe(ROUND));
        let mean = lengths.sums.tokens / lengths.rounds;
        lengths.start();
        assert!(lengths.rounds <= MAX_REMEMBERED);
        assert!((lengths.sums.tokens / lengths.rounds - mean).abs() < 1e-9);
        // a prompt is no idle time
        let before = lengths.rounds;
        lengths.idle(5000);
        assert!(lengths.rounds > 0.99 * before);
    }
}
