//! What the backend needs of a device.

use std::ops::Range;

use super::abi::{MAX_ROWS, PassOutcome, PassRow, RowRace, SequenceRows};
use super::batch_abi::{BATCH_LOGITS_ROWS, BatchOutcome, BatchRow, RowRule};
use super::draft_abi::{DRAFT_RACES, DRAFT_SEQUENCES};
use crate::backend::{Ahead, DraftedToken};
use crate::error::Result;
use crate::policy::Condition;

/// Criteria that an exit rule may have.
pub const MAX_CRITERIA: usize = 4;

/// Sequences that a trained drafter drafts for at once.
pub const MAX_DRAFTS: usize = DRAFT_SEQUENCES;

/// Tokens of a draft that may be sampled, some of which may be accepted before it begins.
pub const MAX_RACES: usize = DRAFT_RACES;

/// Tables of exit rules that a device holds: those of the rows of a batch, and as many that were used
/// before and may come again.
pub const MAX_TABLES: usize = 2 * BATCH_LOGITS_ROWS;

/// The rows of a pass, at most [`MAX_ROWS`], and what is to become of them. Those of a sequence lie on one
/// side of each position that is a power of two from 1024 on, where attention may divide keys anew.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PassPlan {
    /// The rows, those of a sequence one after the other.
    pub rows: Vec<PassRow>,
    /// The sequences, each of at least one row.
    pub sequences: Vec<SequenceRows>,
    /// Bit r: the logits of row r are wanted.
    pub logits_rows: u32,
    /// Bit r: the token of row r is sampled, which needs its logits.
    pub sampled_rows: u32,
    /// By what, by step and row; of no meaning where it is not.
    pub races: [RowRace; MAX_ROWS],
    /// How far the pass goes on by itself: then every sequence has one row, of a token, with logits,
    /// those with a rule [fill](SequenceRows::fills) caches, and there is room for as many rows as all
    /// steps have.
    pub ahead: Ahead,
    /// What the trained drafter drafts when it has ended, of different slots: rows with logits of the
    /// pass, which has one step, verify the tokens.
    pub drafts: Vec<DraftPlan>,
}

/// Tokens of any sequences, each through all layers: also where it exits, since others go on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BatchPlan {
    /// The tokens, those of a sequence one after the other, at consecutive positions; best first those
    /// that are the only ones of their sequences. Passes and batches have run the positions before them, in all layers.
    pub rows: Vec<BatchRow>,
    /// The rows whose logits are wanted.
    pub logits_rows: Vec<usize>,
    /// By what the token of each of these is sampled, if it is.
    pub races: Vec<Option<RowRace>>,
    /// When each of these exits, if a rule decides about that.
    pub rules: Vec<Option<RowRule>>,
    /// What the trained drafter drafts when it has ended, of different slots: logits rows of the batch
    /// verify the tokens.
    pub drafts: Vec<DraftPlan>,
}

/// Rows that a batch may have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchLimits {
    /// All of them; 0 where the device runs none.
    pub rows: usize,
    /// Those whose logits are wanted.
    pub logits_rows: usize,
    /// Whether rules may decide about these.
    pub rules: bool,
}

/// What a trained drafter is to do for a sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DraftPlan {
    /// The slot of the sequence.
    pub slot: usize,
    /// The first position that it takes in. Passes or batches have run it and those after it, in all
    /// layers.
    pub start: usize,
    /// The token after each position; where a pass verifies them, after each but the last. It takes in
    /// one position or more, at most [`ChainDevice::draft_rows`].
    pub tokens: Vec<u32>,
    /// The row of the first position, or its logits row in a batch, where the pass or batch before
    /// verifies the tokens: then it takes in positions up to the first at which another token was
    /// chosen, and drafts after that token.
    pub verifying_row: Option<usize>,
    /// How far it drafts after the last of them, see [`DraftEngine`](crate::backend::DraftEngine);
    /// None where it only takes positions in.
    pub ahead: Option<Ahead>,
    /// By what the tokens are sampled, in their order, after one for each position less one that was
    /// accepted; None where the most probable ones are drafted.
    pub races: Option<[RowRace; MAX_RACES]>,
}

impl DraftPlan {
    /// The most positions that it takes in.
    pub fn positions(&self) -> usize {
        self.tokens.len() + usize::from(self.verifying_row.is_some())
    }
}

/// What came of a draft that followed a pass or a batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FollowingDraft {
    /// Positions that it took in.
    pub positions: usize,
    /// The token after the last of these.
    pub followed: u32,
    /// What it drafted.
    pub drafted: Vec<DraftedToken>,
    /// When it began and ended, in nanoseconds of the device's clock.
    pub span: Range<u64>,
}

/// A device that runs whole passes: weights, caches and saved hidden states of every slot.
///
/// Rows enter a pass at their first layer, as the embedding of their token or as the hidden state
/// saved for their position. A layer's active rows are those that entered there or before. Each
/// writes its keys and values. After each layer the newest row of a sequence decides for all its rows,
/// by the rule and then by `max_depth`. Where a sequence stops, the layers that follow write the keys and
/// values that they make of its active rows' hidden states, or else these are saved. What a row gives
/// depends on no row of another sequence, and not on how rows are spread over passes.
///
/// Every method reports an [`Error::Device`](crate::Error::Device) when the driver fails.
pub trait ChainDevice: Send {
    /// Tokens that the model knows.
    fn vocabulary(&self) -> usize;

    /// Depths after which rules may ask for an entropy probe's risk.
    fn probes(&self) -> &[usize];

    /// Depths after which rules may ask for an exit head's margin and learned signal.
    fn exit_heads(&self) -> &[usize];

    /// Write `conditions`, [criteria, layers] with up to [`MAX_CRITERIA`] criteria, as the table
    /// number `table`, below [`MAX_TABLES`]. Returns its address.
    fn write_conditions(&mut self, table: usize, conditions: &[Condition]) -> Result<u64>;

    /// Run a pass, and wait until it has ended. Its [drafts](PassPlan::drafts) begin then.
    fn run(&mut self, pass: &PassPlan) -> Result<PassOutcome>;

    /// The most rows that a batch may have, and of those that may want logits.
    fn batch_limits(&self) -> BatchLimits {
        BatchLimits::default()
    }

    /// Run a batch, and wait until it has ended. Its [drafts](BatchPlan::drafts) begin then. What it
    /// leaves and gives is what passes do. The logits of a row that exits are those of its exit; then
    /// the layers that follow run it, or, where it freezes, make its keys and values of its hidden state.
    fn run_batch(&mut self, plan: &BatchPlan) -> Result<BatchOutcome> {
        let _ = plan;
        Ok(BatchOutcome::default())
    }

    /// Positions that a trained drafter takes in at once; 0 where there is none.
    fn draft_rows(&self) -> usize {
        0
    }

    /// Let the trained drafter take in what `plans`, which draft nothing, say: one to [`MAX_DRAFTS`] of them,
    /// of different slots. Nothing waits for it but what the drafter does next.
    fn take_in(&mut self, plans: &[DraftPlan]) -> Result<()> {
        let _ = plans;
        Ok(())
    }

    /// Let the trained drafter do what `plans` say, one to [`MAX_DRAFTS`] of them, of different slots, and
    /// wait until it has ended. Returns the tokens that it drafted for each.
    fn draft(&mut self, plans: &[DraftPlan]) -> Result<Vec<Vec<DraftedToken>>> {
        Ok(vec![Vec::new(); plans.len()])
    }

    /// Wait until the drafts of the last pass or batch have ended. Returns what came of each.
    fn following_drafts(&mut self) -> Result<Vec<FollowingDraft>> {
        Ok(Vec::new())
    }

    /// The logits of `rows` of the last pass, whose bits are set in its
    /// [`logits_rows`](PassPlan::logits_rows), or of such of the [rows](BatchPlan::logits_rows) of the
    /// last batch, [rows, vocabulary].
    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>>;

    /// Slots that the memory has room for beside those that there are, with some left to other processes.
    fn room(&self) -> Result<usize> {
        Ok(usize::MAX)
    }

    /// Have `slots` slots, of which none holds anything; [`Error::Memory`](crate::Error::Memory) where
    /// there is no room for them.
    fn reserve(&mut self, slots: usize) -> Result<()>;

    /// Copy the first `length` positions of the caches of the slot `from`, and what a trained drafter
    /// takes of them, to those of `to`.
    fn copy(&mut self, from: usize, length: usize, to: usize) -> Result<()>;

    /// Overwrite the caches of `slot` with zeros.
    fn clear(&mut self, slot: usize) -> Result<()>;
}
