//! What a scheduler reports.

use std::sync::Arc;
use std::time::Duration;

use crate::chain::{DraftSummary, FinishReason, Token};
use crate::error::Error;
use crate::sampler::TokenLogprobs;

/// What one step did for one sequence.
#[derive(Debug)]
pub struct Progress {
    /// The sequence's number.
    pub sequence: u64,
    /// Its new tokens.
    pub tokens: Vec<Token>,
    /// How probable the next tokens of its prompt are, from the second on, where that was asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// How its drafts went since the last report; all zero when nothing was drafted.
    pub drafts: DraftSummary,
    /// Why it ended, where it did. A failure may have ended several sequences.
    pub end: Option<Result<FinishReason, Arc<Error>>>,
    /// Tokens of its prompt that another sequence's cache held.
    pub cached_prompt_tokens: usize,
    /// At the end of the step, since the sequence was added or last had tokens.
    pub waited: Duration,
}

/// How a scheduler stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerStatistics {
    /// Sequences that have a slot.
    pub running: usize,
    /// Sequences that wait for one.
    pub waiting: usize,
    /// Cache positions of running sequences, and of those that have ended and may be continued.
    pub used_cache_tokens: usize,
    /// Cache positions that there may be.
    pub cache_tokens: usize,
    /// How often a sequence had to give up its cache, to be recomputed later.
    pub preemptions: u64,
    /// Sequences that began with tokens which a cache held.
    pub prefix_hits: u64,
    /// These tokens.
    pub prefix_tokens: u64,
}
