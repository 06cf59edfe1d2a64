//! The policy that drafts decode with.

use super::Share;
use crate::policy::{ExitReason, Policy, Signals};

/// Lets a token exit where another policy does, or after `depth` layers as a guess, which is
/// [`ExitReason::Forced`]. Where the policy asks the exit engine there and that says that the guess
/// does not pay, the token goes on to full depth instead, and the positions that wait with it.
pub(super) struct UpTo<'a> {
    pub(super) depth: usize,
    pub(super) policy: &'a mut dyn Policy,
    /// By step of probability: how often a guess after right ones was right.
    pub(super) shares: &'a [Share],
    /// The least probability of being right that makes a guess pay.
    pub(super) least: f64,
    /// Positions of the draft so far. The policy lets nothing exit beyond `depth` then.
    pub(super) waiting: usize,
    /// The step of the token's probability, where the exit engine was asked.
    pub(super) step: Option<usize>,
}

impl UpTo<'_> {
    /// Whether the policy alone decides after `depth` layers.
    fn is_plain(&self, depth: usize) -> bool {
        depth <= self.depth || self.waiting == 0
    }

    fn is_guess(&mut self, signals: Signals) -> bool {
        let probability = signals.exit.map(|exit| exit.learned);
        self.step = probability.map(|probability| step(probability, self.shares.len()));
        // without an engine's word only the head tells how likely, and then the guess is made
        self.step
            .is_none_or(|step| self.shares[step].estimate() >= self.least)
    }
}

impl Policy for UpTo<'_> {
    fn begin(&mut self) {
        self.policy.begin();
    }

    fn reads_exit(&self, depth: usize) -> bool {
        self.is_plain(depth) && self.policy.reads_exit(depth)
    }

    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason> {
        let sure = self.policy.observe(depth, signals);
        if sure.is_some() && self.is_plain(depth) {
            return sure;
        }
        (depth == self.depth && self.is_guess(signals)).then_some(ExitReason::Forced)
    }

    fn rows(&self) -> usize {
        self.waiting + 1
    }
}

/// Which of `steps` equal steps of 0..=1 a probability is on.
pub(super) fn step(probability: f32, steps: usize) -> usize {
    ((probability * steps as f32) as usize).min(steps - 1)
}
