//! A text that waits or runs.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use super::Progress;
use crate::backend::{Costs, StepOutcome};
use crate::chain::{Decoding, DraftSummary, Token};
use crate::error::Error;
use crate::sequence::Sequence;

/// A text, and what has to be known of it while it waits.
pub(super) struct ScheduledText {
    pub(super) decoding: Decoding,
    /// Known once it was admitted.
    pub(super) cached_prompt_tokens: Option<usize>,
    /// Whether it runs in calls of its own until a step succeeds: it, or another, failed in a common
    /// one.
    pub(super) runs_alone: bool,
    /// When it was added or last had tokens.
    since: Instant,
}

/// A text with a cache.
pub(super) struct RunningText {
    pub(super) text: ScheduledText,
    pub(super) sequence: Sequence,
    /// New tokens of the step under way.
    tokens: Vec<Token>,
}

impl ScheduledText {
    pub(super) fn new(decoding: Decoding) -> Self {
        Self {
            decoding,
            cached_prompt_tokens: None,
            runs_alone: false,
            since: Instant::now(),
        }
    }

    /// What is reported when it fails.
    pub(super) fn failure(&self, number: u64, error: Arc<Error>) -> Progress {
        Progress {
            sequence: number,
            tokens: Vec::new(),
            prompt_logprobs: Vec::new(),
            drafts: DraftSummary::default(),
            end: Some(Err(error)),
            cached_prompt_tokens: self.cached_prompt_tokens.unwrap_or(0),
            waited: self.since.elapsed(),
        }
    }
}

impl RunningText {
    pub(super) fn new(text: ScheduledText, sequence: Sequence) -> Self {
        Self {
            text,
            sequence,
            tokens: Vec::new(),
        }
    }

    /// Positions that its sequence has.
    pub(super) fn length(&self) -> usize {
        self.sequence.tokens().len()
    }

    /// Take what came of its step, None where nothing had to run.
    pub(super) fn take(&mut self, outcome: Option<StepOutcome>, costs: &Costs) {
        let tokens = &mut self.tokens;
        let emit = |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        };
        let decoding = &mut self.text.decoding;
        decoding.take(outcome, &mut self.sequence, costs, emit);
        // what made a common step fail may only come with the next token
        self.text.runs_alone &= self.tokens.is_empty();
    }

    /// What its step did, which has ended `now`; None where there is nothing to report.
    pub(super) fn progress(&mut self, number: u64, now: Instant) -> Option<Progress> {
        let tokens = std::mem::take(&mut self.tokens);
        let decoding = &mut self.text.decoding;
        let prompt_logprobs = decoding.take_prompt_logprobs();
        if tokens.is_empty() && prompt_logprobs.is_empty() {
            return None;
        }
        let waited = now - self.text.since;
        if !tokens.is_empty() {
            self.text.since = now;
        }
        Some(Progress {
            sequence: number,
            tokens,
            prompt_logprobs,
            drafts: decoding.take_drafts(),
            end: decoding.finished().map(Ok),
            cached_prompt_tokens: self.text.cached_prompt_tokens.unwrap_or(0),
            waited,
        })
    }

    /// Give the cache up; it is recomputed from the tokens.
    pub(super) fn preempt(mut self) -> ScheduledText {
        self.text.decoding.restart();
        self.text
    }
}
