//! Takes the drafter with the higher expected speedup at each point of the text.

use super::{Acceptance, Draft, DraftContext, Drafter, Proposal, TokenCost};
use crate::backend::{Costs, DraftedToken};
use crate::error::Result;

/// Drafts with the one of its drafters that has the highest expected speedup.
pub(super) struct Auto {
    drafters: Vec<Box<dyn Drafter>>,
    current: usize,
}

impl Auto {
    /// Of `drafters`, at least one, the earlier one where two expect the same.
    pub(super) fn new(drafters: Vec<Box<dyn Drafter>>) -> Self {
        Self {
            drafters,
            current: 0,
        }
    }
}

impl Drafter for Auto {
    fn start(&mut self) {
        self.drafters.iter_mut().for_each(|drafter| drafter.start());
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
        self.drafters[self.current].propose(history, max_tokens, context)
    }

    fn take_drafted(&mut self, drafted: &[DraftedToken], costs: &Costs) -> Draft {
        self.drafters[self.current].take_drafted(drafted, costs)
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
