//! What a trained drafter's kernel and the core hand to each other, see [`abi`](super::abi).

use super::abi::{MAX_ROWS, RowRace};
use crate::backend::{DraftedToken, MARGIN_BINS, MAX_AHEAD};

/// Sequences that it drafts for in one launch.
pub(super) const DRAFT_SEQUENCES: usize = 8;

/// Races of its tokens, also of those that are drafted after some were accepted.
pub(super) const DRAFT_RACES: usize = 2 * MAX_ROWS;

/// What it takes in of a sequence, and how far it drafts after that.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DraftSequence {
    pub(super) slot: i32,
    /// The first position that it takes in.
    pub(super) start: i32,
    /// Positions that it takes in.
    pub(super) rows: i32,
    /// Tokens that it drafts at most.
    pub(super) steps: i32,
    /// Whether they are sampled.
    pub(super) sampled: i32,
    /// -1, or the row of the first position in the pass before, or its logits row in the batch before,
    /// which verifies `token`: then it takes in positions up to the first at which another token was
    /// chosen.
    pub(super) verifying_row: i32,
    /// The token after each position.
    pub(super) token: [i32; MAX_ROWS],
    /// By drafted token, after the number of positions less one that were accepted.
    pub(super) race: [RowRace; DRAFT_RACES],
    /// See [`Ahead`](crate::backend::Ahead).
    pub(super) min_accepted: [f32; MAX_AHEAD],
    pub(super) acceptance: [f32; MARGIN_BINS],
}

/// The only parameter of a trained drafter's kernel: device addresses of its weights and of what it
/// keeps, and what it is to do.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DraftParameters {
    pub(super) combine: u64,
    pub(super) join: u64,
    pub(super) qkv: u64,
    pub(super) o: u64,
    pub(super) gate_up: u64,
    pub(super) down: u64,
    pub(super) head: u64,
    pub(super) feature_norms: u64,
    pub(super) state_norm: u64,
    pub(super) embedding_norm: u64,
    pub(super) attention_norm: u64,
    pub(super) mlp_norm: u64,
    pub(super) norm: u64,
    /// fp32 [head size / 2].
    pub(super) frequencies: u64,
    /// int32 [draft tokens].
    pub(super) tokens: u64,
    /// The model's.
    pub(super) embed: u64,
    /// The model's hidden states, as [`PassParameters::feature_states`](super::abi::PassParameters::feature_states).
    pub(super) features: u64,
    /// fp16 [slot, key-value heads, capacity, head size], as `values`.
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) scratch: u64,
    /// As [`PassParameters::chosen`](super::abi::PassParameters::chosen).
    pub(super) chosen: u64,
    /// Pinned memory of the host, by sequence.
    pub(super) outcome: u64,
    pub(super) capacity: i32,
    pub(super) sequences: i32,
    /// Of each sequence.
    pub(super) blocks: i32,
    pub(super) features_of_position: i32,
    pub(super) draft_tokens: i32,
    pub(super) norm_epsilon: f32,
    pub(super) sequence: [DraftSequence; DRAFT_SEQUENCES],
}

/// What the host reads of a sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DraftOutcome {
    /// The device's clock at its beginning and end, in nanoseconds.
    pub(super) started: u64,
    pub(super) ended: u64,
    /// How many were drafted.
    pub(super) tokens: i32,
    /// Positions that were taken in.
    pub(super) rows: i32,
    /// The token after the last of these.
    pub(super) followed: i32,
    /// Padding.
    pub(super) unused: i32,
    pub(super) token: [i32; MAX_ROWS],
    /// That the drafter gives each.
    pub(super) probability: [f32; MAX_ROWS],
}

impl DraftOutcome {
    /// The tokens.
    pub(super) fn drafted(&self) -> Vec<DraftedToken> {
        let all = self.token.into_iter().zip(self.probability);
        let drafted = all.take(self.tokens as usize);
        drafted
            .map(|(token, probability)| DraftedToken {
                token: token as u32,
                probability,
            })
            .collect()
    }
}

const _: () = {
    assert!(size_of::<DraftSequence>() == 376);
    assert!(size_of::<DraftParameters>() == 3208);
    assert!(size_of::<DraftOutcome>() == 96);
};
