//! Drafts by a small layer that was trained for the model.

use super::round_lengths::{RoundLength, RoundLengths};
use super::{Acceptance, AcceptanceRate, Draft, DraftContext, Drafter, Proposal, TokenCost};
use crate::backend::{Ahead, Costs, DraftedToken, MARGIN_BINS, MAX_AHEAD, margin_bin};
use crate::error::Result;

/// Longer drafts are seldom accepted whole.
const MAX_DRAFTED: usize = MAX_AHEAD;
/// The speedup that is expected before costs are known.
const PRIOR_SPEEDUP: f64 = 1.3;
/// How probable it must be that the next round has its draft too, for that to begin before this is known:
/// one for nothing takes a GPU about three times as long as the host needs.
const MIN_AGAIN: f64 = 0.75;
/// Whether it had counts less with every newer time.
const AGAIN_DECAY: f64 = 0.9;

/// Takes the model's hidden states at the verified positions through a trained layer, drafts the
/// token that it finds, and goes on from its own state for as long as the next token is worth what
/// it costs (EAGLE-3, Li et al. 2025, <https://arxiv.org/abs/2503.01840>).
#[derive(Debug)]
pub(super) struct Trained {
    layers: usize,
    /// Positions of the text that the layer's cache holds states of the model for.
    verified: usize,
    rounds: RoundLengths,
    expected_speedup: f64,
    /// What a token costs without drafts.
    baseline: TokenCost,
    /// By the probability of the drafted token, of those drafted after accepted ones.
    rates: Vec<AcceptanceRate>,
    /// The tokens of the last draft, and their bins of probability.
    drafted: Vec<(u32, usize)>,
    /// How many were drafted, those that were not worth verifying included.
    steps: usize,
    /// Tokens that the last draft might have had.
    max_tokens: usize,
    /// How often a round with its draft comes after another, and of the last two rounds, whether they
    /// had one.
    again: f64,
    drafted_in: [bool; 2],
}

impl Trained {
    pub(super) fn new(layers: usize) -> Self {
        let middle = |bin| (bin as f64 + 0.5) / MARGIN_BINS as f64;
        Self {
            layers,
            verified: 0,
            rounds: RoundLengths::default(),
            expected_speedup: 1.0,
            baseline: TokenCost::default(),
            rates: (0..MARGIN_BINS)
                .map(|bin| AcceptanceRate::new(middle(bin)))
                .collect(),
            drafted: Vec::new(),
            steps: 0,
            max_tokens: 0,
            again: 0.5,
            drafted_in: [false; 2],
        }
    }

    /// The probability with which all tokens up to the one after `drafted` others must be accepted for
    /// it to be worth drafting and verifying.
    fn min_accepted(&self, drafted: usize, costs: &Costs) -> f64 {
        if drafted == 0 {
            return 0.0;
        }
        let verify = |tokens| self.baseline.verification(costs, self.layers, tokens);
        let cost = self.token(costs) + verify(drafted + 2) - verify(drafted + 1);
        cost * self.expected_speedup / self.baseline.seconds
    }

    /// Seconds of a drafted token.
    fn token(&self, costs: &Costs) -> f64 {
        costs.draft_token(self.baseline.drafted_for)
    }

    /// The speedup of rounds as they were on average, by what they cost now.
    fn speedup(&self, costs: &Costs) -> f64 {
        let mean = self.rounds.mean();
        let verify = |tokens: f64| {
            self.baseline
                .verification(costs, self.layers, tokens as usize)
        };
        let (fewer, more) = (mean.verified.floor(), mean.verified.ceil());
        let share = mean.verified - fewer;
        let verification = verify(fewer) * (1.0 - share) + verify(more) * share;
        match mean.drafted * self.token(costs) + verification {
            0.0 => PRIOR_SPEEDUP,
            cost => mean.tokens * self.baseline.seconds / cost,
        }
    }

    /// How far to draft, to `tokens` tokens at most.
    fn ahead(&self, tokens: usize, costs: &Costs) -> Ahead {
        let rates = self.rates.iter().map(AcceptanceRate::estimate);
        let highest = rates.fold(f64::MIN_POSITIVE, f64::max);
        Ahead {
            acceptance: std::array::from_fn(|bin| self.rates[bin].estimate() as f32),
            // a token that is kept is worth rolling out where the next one may be kept
            min_accepted: std::array::from_fn(|index| {
                let kept = self.min_accepted(index, costs);
                kept.max(self.min_accepted(index + 1, costs) / highest) as f32
            }),
            ..Ahead::of(tokens)
        }
    }

    /// How far to draft after the last draft, should all of it be accepted, where another one is probable.
    fn next(&self, costs: &Costs) -> Option<Ahead> {
        let left = self.max_tokens.saturating_sub(self.drafted.len() + 1);
        let begins = left > 0 && self.again >= MIN_AGAIN;
        begins.then(|| self.ahead(left.min(MAX_DRAFTED), costs))
    }

    /// A round begins.
    fn note_round(&mut self) {
        if self.drafted_in[0] {
            let again = f64::from(u8::from(self.drafted_in[1]));
            self.again = AGAIN_DECAY * self.again + (1.0 - AGAIN_DECAY) * again;
        }
        self.drafted_in = [self.drafted_in[1], false];
    }

    /// Keep those of `drafted` that are worth verifying.
    fn keep(&mut self, drafted: &[DraftedToken], costs: &Costs) {
        self.drafted.clear();
        let mut accepted = 1.0;
        for (index, of) in drafted.iter().enumerate() {
            let bin = margin_bin(of.probability);
            accepted *= self.rates[bin].estimate();
            if accepted < self.min_accepted(index, costs) {
                return;
            }
            self.drafted.push((of.token, bin));
        }
    }
}

impl Drafter for Trained {
    fn start(&mut self) {
        self.verified = 0;
        self.drafted_in = [false; 2];
        self.rounds.start();
    }

    fn expected_speedup(
        &mut self,
        history: &[u32],
        _: usize,
        costs: &Costs,
        baseline: TokenCost,
    ) -> f64 {
        self.note_round();
        self.rounds.idle(history.len());
        self.rates.iter_mut().for_each(AcceptanceRate::decay);
        self.baseline = baseline;
        let speedup = self.speedup(costs);
        self.expected_speedup = speedup.max(1.0);
        speedup
    }

    fn propose(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        context: &mut DraftContext<'_>,
    ) -> Result<Proposal> {
        self.max_tokens = max_tokens;
        self.drafted_in[1] = true;
        let ahead = self.ahead(max_tokens.min(MAX_DRAFTED), context.backend.costs());
        // the state at a position goes with the token after it
        let positions = self.verified..history.len() - 1;
        self.verified = history.len() - 1;
        Ok(Proposal::Trained(positions, ahead))
    }

    fn take_drafted(&mut self, drafted: &[DraftedToken], costs: &Costs) -> Draft {
        self.steps = drafted.len();
        self.keep(drafted, costs);
        Draft {
            tokens: self.drafted.iter().map(|&(token, _)| token).collect(),
            next: self.next(costs),
            ..Draft::default()
        }
    }

    fn observe(&mut self, tokens: &[u32], _: &Costs) {
        for (&token, &(drafted, bin)) in tokens.iter().zip(&self.drafted) {
            self.rates[bin].observe(token == drafted);
        }
        self.rounds.observe(RoundLength {
            tokens: tokens.len() as f64,
            drafted: self.steps as f64,
            verified: (self.drafted.len() + 1) as f64,
        });
    }

    fn recall(&mut self, acceptance: &Acceptance) {
        let Some(remembered) = &acceptance.trained else {
            return;
        };
        let sums = RoundLength {
            tokens: remembered.tokens,
            drafted: remembered.drafted,
            verified: remembered.verified,
        };
        self.rounds.recall(remembered.rounds, sums);
        for (rate, &remembered) in self.rates.iter_mut().zip(&remembered.rates) {
            rate.recall(remembered);
        }
    }

    fn record(&self, acceptance: &mut Acceptance) {
        let RoundLengths { rounds, sums, .. } = self.rounds;
        acceptance.trained = Some(super::TrainedAcceptance {
            rounds,
            tokens: sums.tokens,
            drafted: sums.drafted,
            verified: sums.verified,
            rates: self.rates.iter().map(AcceptanceRate::estimate).collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a draft comes after another, once rounds were with a draft or without as `drafts` say.
    fn again(drafts: impl IntoIterator<Item = bool>) -> f64 {
        let mut drafter = Trained::new(4);
        for drafts in drafts {
            drafter.note_round();
            drafter.drafted_in[1] = drafts;
        }
        drafter.again
    }

    #[test]
    fn the_next_draft_begins_where_one_comes_after_another() {
        assert!(again([true; 5]) < MIN_AGAIN, "that has to be seen first");
        assert!(again([true; 20]) >= MIN_AGAIN);
        let every_other = (0..40).map(|round| round % 2 == 0);
        assert!(again(every_other) < 0.2);
        // rounds that are not after a draft say nothing
        let then_none = (0..20).map(|_| true).chain([false; 100]);
        assert!(again(then_none) >= MIN_AGAIN);
    }
}
