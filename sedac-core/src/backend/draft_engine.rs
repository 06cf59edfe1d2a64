//! What a backend provides where there is a trained drafter.

use std::ops::Range;

use super::{Ahead, LogitsRequest, PositionLogits};
use crate::error::Result;
use crate::interrupt::Interrupt;

/// A trained drafter at work.
///
/// Its cache holds a state for each verified position, made of the model's hidden states there and
/// of the token that followed, and after them states of its own rollout.
pub trait DraftEngine {
    /// Take in the model's hidden states at `positions`, one or more, all of which the model has run,
    /// and the `tokens` that followed. Nothing is kept of positions from `positions.start` on.
    ///
    /// Then draft the token after the last of these, and go on from it as `ahead` says: the acceptance
    /// of a token is that of its probability's bin.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled) when interrupted, and what the engines report.
    fn draft(
        &mut self,
        positions: Range<usize>,
        tokens: &[u32],
        ahead: &Ahead,
        choice: &mut dyn DraftChoice,
        interrupt: &Interrupt,
    ) -> Result<Vec<DraftedToken>>;
}

/// Chooses the tokens of a draft.
pub trait DraftChoice {
    /// What the next `positions` tokens are chosen from.
    fn request(&mut self, positions: usize) -> LogitsRequest;

    /// The next token.
    fn choose(&mut self, logits: PositionLogits<'_>) -> u32;
}

/// A token that was drafted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DraftedToken {
    /// The token.
    pub token: u32,
    /// The probability that the drafter gives it.
    pub probability: f32,
}
