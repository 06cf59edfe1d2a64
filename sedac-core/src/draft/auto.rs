//! Takes the drafter with the higher expected speedup at each point of the text.

use super::{Acceptance, Draft, DraftContext, Drafter};
use crate::backend::Costs;
use crate::error::Result;

/// Drafts with the one of two drafters that has the higher expected speedup.
#[derive(Debug)]
pub(super) struct Auto<A, B> {
    first: A,
    second: B,
    second_drafts: bool,
}

impl<A: Drafter, B: Drafter> Auto<A, B> {
    pub(super) fn new(first: A, second: B) -> Self {
        Self {
            first,
            second,
            second_drafts: false,
        }
    }

    fn current(&mut self) -> &mut dyn Drafter {
        if self.second_drafts {
            &mut self.second
        } else {
            &mut self.first
        }
    }
}

impl<A: Drafter, B: Drafter> Drafter for Auto<A, B> {
    fn start(&mut self) {
        self.first.start();
        self.second.start();
    }

    fn expected_speedup(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        costs: &Costs,
        baseline: f64,
    ) -> f64 {
        let (first, second) = (&mut self.first, &mut self.second);
        let first = first.expected_speedup(history, max_tokens, costs, baseline);
        let second = second.expected_speedup(history, max_tokens, costs, baseline);
        self.second_drafts = second > first;
        first.max(second)
    }

    fn propose(
        &mut self,
        history: &[u32],
        max_tokens: usize,
        context: &mut DraftContext<'_>,
    ) -> Result<Draft> {
        self.current().propose(history, max_tokens, context)
    }

    fn observe(&mut self, tokens: &[u32], costs: &Costs) {
        self.current().observe(tokens, costs);
    }
    fn recall(&mut self, acceptance: &Acceptance) {
        self.first.recall(acceptance);
        self.second.recall(acceptance);
    }

    fn record(&self, acceptance: &mut Acceptance) {
        self.first.record(acceptance);
        self.second.record(acceptance);
    }
}
