//! Takes the drafter with the higher expected speedup at each point of the text.

use super::{Acceptance, Draft, DraftContext, Drafter, Proposal, TokenCost};
use crate::backend::{Costs, DraftedToken};
use crate::error::Result;

/// How probable it must be that the trained drafter drafts again for its next draft to begin before that
/// is known: one for nothing takes the GPU about three times as long as the host needs.
const MIN_AGAIN: f64 = 0.75;
/// Whether it did counts less with every newer time.
const AGAIN_DECAY: f64 = 0.9;

/// Drafts with the one of its drafters that has the highest expected speedup.
pub(super) struct Auto {
    drafters: Vec<Box<dyn Drafter>>,
    current: usize,
    /// How often the trained drafter drafts after it did, and whether it did last.
    again: f64,
    has_trained: bool,
}

impl Auto {
    /// Of `drafters`, at least one, the earlier one where two expect the same.
    pub(super) fn new(drafters: Vec<Box<dyn Drafter>>) -> Self {
        Self {
            drafters,
            current: 0,
            again: 0.5,
            has_trained: false,
        }
    }
}

impl Drafter for Auto {
    fn start(&mut self) {
        self.drafters.iter_mut().for_each(|drafter| drafter.start());
        self.has_trained = false;
    }

    fn expected_speedup(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        costs: &Costs,
        baseline: TokenCost,
    ) -> f64 {
        let mut best = f64::NEG_INFINITY;
        for (index, drafter) in self.drafters.iter_mut().enumerate() {
            let speedup = drafter.expected_speedup(history, max_tokens, costs, baseline);
            if speedup > best {
                (best, self.current) = (speedup, index);
            }
        }
        best
    }

    fn propose(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        context: &mut DraftContext<'_>,
    ) -> Result<Proposal> {
        let proposal = self.drafters[self.current].propose(history, max_tokens, context)?;
        let is_trained = matches!(proposal, Proposal::Trained(..));
        if std::mem::replace(&mut self.has_trained, is_trained) {
            let again = f64::from(u8::from(is_trained));
            self.again = AGAIN_DECAY * self.again + (1.0 - AGAIN_DECAY) * again;
        }
        Ok(proposal)
    }

    fn take_drafted(&mut self, drafted: &[DraftedToken], costs: &Costs) -> Draft {
        let draft = self.drafters[self.current].take_drafted(drafted, costs);
        Draft {
            next: draft.next.filter(|_| self.again >= MIN_AGAIN),
            ..draft
        }
    }

    fn observe(&mut self, tokens: &[u32], costs: &Costs) {
        self.drafters[self.current].observe(tokens, costs);
    }

    fn recall(&mut self, acceptance: &Acceptance) {
        for drafter in &mut self.drafters {
            drafter.recall(acceptance);
        }
    }

    fn record(&self, acceptance: &mut Acceptance) {
        for drafter in &self.drafters {
            drafter.record(acceptance);
        }
    }
}
