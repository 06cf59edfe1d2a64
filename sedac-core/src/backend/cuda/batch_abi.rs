//! What the kernels of batches and the core hand to each other, see [`abi`](super::abi).

use super::abi::{RaceOutcome, RowOutcome};

/// Rows of a batch.
pub(super) const BATCH_ROWS: usize = 512;

/// Rows of a batch whose logits it gives.
pub(super) const BATCH_LOGITS_ROWS: usize = 64;

/// Consecutive rows of a sequence that attention takes together.
pub(super) const BATCH_GROUP_ROWS: usize = 8;

/// Rows of a batch that is one kernel.
pub(super) const SMALL_BATCH_ROWS: usize = 64;

/// The kernels of batches, by launch: one with several kinds of launches has several places.
pub(super) const BATCH_KERNELS: [&str; 11] = [
    "batch_start",
    "prefill_product",
    "prefill_product",
    "prefill_product",
    "prefill_product",
    "prefill_attention",
    "batch_attention",
    "batch_heads",
    "batch_add",
    "batch_head",
    "batch_whole",
];

pub(super) const START: usize = 0;
const PREFILL_QKV: usize = 1;
const PREFILL_O: usize = 2;
const PREFILL_GATE_UP: usize = 3;
const PREFILL_DOWN: usize = 4;
/// Of groups of rows.
pub(super) const PREFILL_ATTENTION: usize = 5;
/// Of single rows.
pub(super) const ATTENTION: usize = 6;
const HEADS: usize = 7;
const ADD: usize = 8;
/// What gives logits, and chooses tokens. Cooperative, as the next one.
pub(super) const HEAD: usize = 9;
/// All of a batch of up to [`SMALL_BATCH_ROWS`].
pub(super) const WHOLE: usize = 10;

/// What a layer of more rows launches, each with its stage.
pub(super) const BATCH_LAYER: [(usize, i32); 9] = [
    (PREFILL_QKV, 0),
    (HEADS, 0),
    (ATTENTION, 0),
    (PREFILL_ATTENTION, 0),
    (PREFILL_O, 1),
    (ADD, 1),
    (PREFILL_GATE_UP, 2),
    (PREFILL_DOWN, 3),
    (ADD, 3),
];

/// How a kernel is launched: a block for each `rows` rows, in `blocks` columns, or where that is 0 in
/// as many as a pass has blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct BatchLaunch {
    /// Of a block.
    pub(super) threads: u32,
    /// Dynamic shared memory of a block.
    pub(super) shared_bytes: u32,
    pub(super) rows: u32,
    pub(super) blocks: u32,
}

/// A token of a batch, which goes through all layers.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchRow {
    /// The token.
    pub token: i32,
    /// Its position.
    pub position: i32,
    /// The slot of its sequence.
    pub slot: i32,
}

/// When a row of a batch exits.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowRule {
    /// Device address of [`Condition`](crate::policy::Condition)s, [criteria, layers], which ask for
    /// stability and for the entropy probe's risk only.
    pub conditions: u64,
    /// Criteria of the rule.
    pub criteria: i32,
    /// Whether its hidden state stays as it is then, and fills the caches of the layers that follow.
    pub freezes: i32,
}

/// Where a row of a batch exited.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowExit {
    /// The layers before, all where it did not.
    pub depth: i32,
    /// The criterion that said so, -1 for none.
    pub criterion: i32,
}

/// The first parameter of the kernels, beside a layer and a stage. What is not described is as in
/// [`PassParameters`](super::abi::PassParameters).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct BatchParameters {
    pub(super) layers: u64,
    pub(super) embed: u64,
    pub(super) head: u64,
    pub(super) final_norm: u64,
    pub(super) cos: u64,
    pub(super) sin: u64,
    pub(super) scratch: u64,
    /// [logits row, vocabulary], fp32.
    pub(super) logits: u64,
    /// Pinned memory of the host, as `races` and `rules`.
    pub(super) outcome: u64,
    /// By logits row.
    pub(super) races: u64,
    pub(super) rules: u64,
    pub(super) feature_states: u64,
    /// int32 [logits row], as [`PassParameters::chosen`](super::abi::PassParameters::chosen).
    pub(super) chosen: u64,
    /// Bit i: the token of logits row i is sampled.
    pub(super) sampled: u64,
    /// Bit i: a rule decides about logits row i.
    pub(super) deciding: u64,
    pub(super) capacity: i32,
    pub(super) blocks: i32,
    pub(super) features: i32,
    pub(super) feature_depths: [i32; 4],
    pub(super) rows: i32,
    pub(super) logits_rows: i32,
    /// The first rows, which have attention of their own.
    pub(super) single_rows: i32,
    /// Of the others: consecutive tokens of one sequence, up to [`BATCH_GROUP_ROWS`].
    pub(super) groups: i32,
    pub(super) row: [BatchRow; BATCH_ROWS],
    /// The rows whose logits are wanted.
    pub(super) logits_row: [u16; BATCH_LOGITS_ROWS],
    /// The first row of each group.
    pub(super) group: [u16; BATCH_ROWS],
}

/// What the host reads after a batch, by logits row.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchOutcome {
    /// Of each.
    pub row: [RowOutcome; BATCH_LOGITS_ROWS],
    /// Of those whose tokens are sampled.
    pub race: [RaceOutcome; BATCH_LOGITS_ROWS],
    /// Where each exited.
    pub exit: [RowExit; BATCH_LOGITS_ROWS],
    /// When it started, in nanoseconds of the device's clock.
    pub started: u64,
    /// When the last layer ended.
    pub layers_ended: u64,
    /// When the head ended, where logits are wanted.
    pub ended: u64,
}

impl Default for BatchOutcome {
    fn default() -> Self {
        Self {
            row: [RowOutcome::default(); BATCH_LOGITS_ROWS],
            race: [RaceOutcome::default(); BATCH_LOGITS_ROWS],
            exit: [RowExit::default(); BATCH_LOGITS_ROWS],
            started: 0,
            layers_ended: 0,
            ended: 0,
        }
    }
}

const _: () = {
    assert!(size_of::<BatchRow>() == 12);
    assert!(size_of::<RowRule>() == 16);
    assert!(size_of::<RowExit>() == 8);
    assert!(size_of::<BatchParameters>() == 7464);
    assert!(size_of::<BatchOutcome>() == 2584);
    assert!(BATCH_LOGITS_ROWS <= u64::BITS as usize);
};
