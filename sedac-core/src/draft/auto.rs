//! The drafter that promises most at each point of the text.

use super::{Draft, Drafter, Tools};
use crate::backend::Costs;
use crate::error::Result;

/// Drafts with the one of two drafters that promises more tokens a second.
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
    fn promise(&mut self, history: &[u32], most: usize, costs: &Costs, plain: f64) -> f64 {
        let first = self.first.promise(history, most, costs, plain);
        let second = self.second.promise(history, most, costs, plain);
        self.second_drafts = second > first;
        first.max(second)
    }

    fn draft(&mut self, history: &[u32], most: usize, tools: &mut Tools<'_>) -> Result<Draft> {
        self.current().draft(history, most, tools)
    }

    fn learn(&mut self, tokens: &[u32], costs: &Costs) {
        self.current().learn(tokens, costs);
    }
}
