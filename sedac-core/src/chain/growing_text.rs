//! The tokens of a text, and when it ends.

use std::ops::ControlFlow;

use super::{FinishReason, Request, Token};
use crate::backend::{PositionLogits, StepExit};
use crate::sampler::{Sampler, TokenLogprobs};

/// Takes tokens; the text ends where it breaks.
pub(super) trait Emit: FnMut(Token) -> ControlFlow<()> {}

impl<F: FnMut(Token) -> ControlFlow<()>> Emit for F {}

/// The text as it grows, and when it ends.
pub(super) struct Text {
    pub(super) sampler: Sampler,
    stop_tokens: Vec<u32>,
    /// Prompt and output so far.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: usize,
    /// The length at which the text ends: `max_new_tokens` or the cache allows no more.
    pub(super) max_length: usize,
    pub(super) finished: Option<FinishReason>,
    /// Positions of the prompt from the first on whose next tokens are scored, where that is asked for.
    pub(super) scored: usize,
    /// How probable these tokens are, but for those that were handed on.
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
}

impl Text {
    /// The prompt, in a cache of `capacity` positions.
    pub(super) fn new(request: &Request, sampler: Sampler, capacity: usize) -> Self {
        let prompt_tokens = request.prompt.len();
        // the last token is not run, so it needs no position
        let max_new_tokens = request.max_new_tokens.min(capacity - prompt_tokens + 1);
        Self {
            sampler,
            stop_tokens: request.stop_tokens.clone(),
            tokens: request.prompt.clone(),
            prompt_tokens,
            max_length: prompt_tokens + max_new_tokens,
            finished: None,
            scored: 0,
            prompt_logprobs: Vec::new(),
        }
    }

    /// Tokens that may still follow.
    pub(super) fn room(&self) -> usize {
        self.max_length - self.tokens.len()
    }

    pub(super) fn has_output(&self) -> bool {
        self.tokens.len() > self.prompt_tokens
    }

    /// Whether tokens of the prompt are scored as it is prefilled.
    pub(super) fn scores_prompt(&self) -> bool {
        self.sampler.scores_prompt() && !self.has_output()
    }

    /// Score the prompt's token after `position` by the logits there, unless it was before the sequence
    /// lost its cache.
    pub(super) fn score(&mut self, position: usize, logits: PositionLogits<'_>) {
        let PositionLogits::All(logits) = logits else {
            return;
        };
        if position == self.scored && position + 1 < self.prompt_tokens {
            let next = self.tokens[position + 1];
            self.prompt_logprobs
                .extend(self.sampler.logprobs(logits, next));
            self.scored += 1;
        }
    }

    pub(super) fn newest(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Choose a token by `logits`, which `exit` gave, and hand it to `emit`. `drafted` is what was
    /// drafted in its place.
    pub(super) fn take(
        &mut self,
        logits: PositionLogits<'_>,
        exit: StepExit,
        drafted: Option<u32>,
        emit: &mut impl Emit,
    ) -> u32 {
        let (id, logprobs) = match logits {
            PositionLogits::All(logits) => {
                let id = self.sampler.sample(logits, &self.tokens);
                (id, self.sampler.logprobs(logits, id))
            }
            PositionLogits::Chosen(token) => {
                self.sampler.skip();
                (token, None)
            }
        };
        self.tokens.push(id);
        let flow = emit(Token {
            id,
            exit,
            is_accepted_draft: drafted == Some(id),
            logprobs,
        });
        if flow.is_break() || self.stop_tokens.contains(&id) {
            self.finished = Some(FinishReason::Stop);
        } else if self.room() == 0 {
            self.finished = Some(FinishReason::Length);
        }
        id
    }
}
