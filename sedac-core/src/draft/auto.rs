//! Prompt lookup where it finds something, early exit otherwise.

use std::time::Duration;

use super::{Draft, Drafter};
use crate::backend::Backend;
use crate::error::Result;
use crate::interrupt::Interrupt;

/// Asks `first`, and `second` when that has nothing to offer or knows that `second` is faster.
#[derive(Debug)]
pub(super) struct Auto<A, B> {
    first: A,
    second: B,
    second_drafted: bool,
}

impl<A, B> Auto<A, B> {
    pub(super) fn new(first: A, second: B) -> Self {
        Self {
            first,
            second,
            second_drafted: false,
        }
    }
}

impl<A: Drafter, B: Drafter> Drafter for Auto<A, B> {
    fn draft(
        &mut self,
        history: &[u32],
        most: usize,
        backend: &mut dyn Backend,
        interrupt: &Interrupt,
    ) -> Result<Draft> {
        let draft = self.first.draft(history, most, backend, interrupt)?;
        self.second_drafted = false;
        if !draft.tokens.is_empty() {
            return Ok(draft);
        }
        let draft = self.second.draft(history, most, backend, interrupt)?;
        self.second_drafted = draft.depth > 0;
        Ok(draft)
    }

    fn learn(&mut self, tokens: usize, elapsed: Duration) {
        if self.second_drafted {
            // to the first, the second is what happens without it, and what it has to beat
            self.first.learn_without(tokens, elapsed);
            self.second.learn(tokens, elapsed);
        } else {
            self.first.learn(tokens, elapsed);
        }
    }

    fn learn_without(&mut self, tokens: usize, elapsed: Duration) {
        self.first.learn_without(tokens, elapsed);
        self.second.learn_without(tokens, elapsed);
    }
}
