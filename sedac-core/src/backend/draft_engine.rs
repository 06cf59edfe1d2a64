//! What a backend provides where there is a trained drafter.

use std::ops::Range;
use std::time::Duration;

use super::{Ahead, LogitsRequest, PositionLogits};
use crate::error::Result;
use crate::interrupt::Interrupt;

/// What a trained drafter is to do for one sequence.
pub struct DraftRequest<'a> {
    /// The slot of the sequence.
    pub slot: usize,
    /// Positions whose hidden states it takes in, one or more, all of which the model has run. Nothing is
    /// kept of positions from their start on.
    pub positions: Range<usize>,
    /// The tokens that followed.
    pub tokens: &'a [u32],
    /// How far it drafts after the last of these: the acceptance of a token is that of its
    /// probability's bin.
    pub ahead: Ahead,
    /// Chooses what is drafted.
    pub choice: Box<dyn DraftChoice + 'a>,
}

/// A trained drafter at work.
///
/// The cache that it has for a slot holds a state for each verified position, made of the model's hidden
/// states there and of the token that followed, and after them states of its own rollout.
pub trait DraftEngine {
    /// Take positions in and draft, for one sequence or several.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled) when interrupted, and what the engines report.
    fn draft(&mut self, requests: &mut [DraftRequest<'_>], interrupt: &Interrupt)
    -> Result<Drafts>;
}

/// What came of requests.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drafts {
    /// The drafts, in the order of the requests, each of one token or more.
    pub drafted: Vec<Vec<DraftedToken>>,
    /// What they took, whether or not somebody waited for them.
    pub elapsed: Duration,
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
