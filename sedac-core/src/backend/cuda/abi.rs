//! What the kernel and the core hand to each other, as it lies in memory: mirrors of the structs in
//! `sedac_export/cuda/kernels`, whose sizes are compared when a module is loaded.

use std::mem::offset_of;

use super::batch_abi::{BATCH_KERNELS, BatchLaunch};
use crate::backend::{MARGIN_BINS, MAX_AHEAD};
use crate::bundle::KERNEL_ROWS;
use crate::policy::Condition;

/// Version of everything in this file.
pub(super) const ABI: u32 = 14;

/// Rows that one pass may have.
pub const MAX_ROWS: usize = KERNEL_ROWS[KERNEL_ROWS.len() - 1];

/// Whether attention may divide keys in another way from `position` on: no pass has rows of a sequence
/// before it and from there on.
pub(super) fn divides_anew(position: usize) -> bool {
    position >= 1024 && position.is_power_of_two()
}

/// Facts about a compiled chain: the module's constant `sedac_facts`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ChainFacts {
    pub(super) abi: u32,
    pub(super) layer_bytes: u32,
    pub(super) pass_bytes: u32,
    pub(super) outcome_bytes: u32,
    /// Of a block.
    pub(super) threads: u32,
    /// Dynamic shared memory of each of [`KERNEL_ROWS`].
    pub(super) shared_bytes: [u32; KERNEL_ROWS.len()],
    pub(super) min_blocks: u32,
    pub(super) max_blocks: u32,
    /// Positions that a cache slot may have.
    pub(super) max_capacity: u32,
    /// Of a block.
    pub(super) table_bytes: u32,
    /// Of a position: its hidden state at an exit, and what belongs to it.
    pub(super) saved_floats: u32,
    /// Of 16 rows and 32 columns of a matrix.
    pub(super) weight_block_bytes: u32,
    /// Of the structs that a trained drafter's kernel takes and gives.
    pub(super) draft_pass_bytes: u32,
    pub(super) draft_outcome_bytes: u32,
    /// Of a block of that kernel, as its shared memory.
    pub(super) draft_threads: u32,
    pub(super) draft_shared_bytes: u32,
    /// Positions that it takes in at once.
    pub(super) draft_rows: u32,
    /// Of the structs that the kernels of batches take and give.
    pub(super) batch_pass_bytes: u32,
    pub(super) batch_outcome_bytes: u32,
    /// By [`BATCH_KERNELS`].
    pub(super) batch: [BatchLaunch; BATCH_KERNELS.len()],
    /// Of one of the two sets.
    pub(super) scratch_bytes: u64,
    /// Of a trained drafter.
    pub(super) draft_scratch_bytes: u64,
    /// Of batches.
    pub(super) batch_scratch_bytes: u64,
}

impl ChainFacts {
    /// The facts that lie in `bytes`; None where these are of another size.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        let (words, _) = bytes.as_chunks::<4>();
        let word = |index: usize| u32::from_le_bytes(words[index]);
        let size_at = |at: usize| {
            let (&size, _) = bytes[at..].split_first_chunk::<8>()?;
            Some(u64::from_le_bytes(size))
        };
        let launch = |index: usize| BatchLaunch {
            threads: word(22 + 4 * index),
            shared_bytes: word(23 + 4 * index),
            rows: word(24 + 4 * index),
            blocks: word(25 + 4 * index),
        };
        Some(Self {
            abi: word(0),
            layer_bytes: word(1),
            pass_bytes: word(2),
            outcome_bytes: word(3),
            threads: word(4),
            shared_bytes: [word(5), word(6), word(7), word(8)],
            min_blocks: word(9),
            max_blocks: word(10),
            max_capacity: word(11),
            table_bytes: word(12),
            saved_floats: word(13),
            weight_block_bytes: word(14),
            draft_pass_bytes: word(15),
            draft_outcome_bytes: word(16),
            draft_threads: word(17),
            draft_shared_bytes: word(18),
            draft_rows: word(19),
            batch_pass_bytes: word(20),
            batch_outcome_bytes: word(21),
            batch: std::array::from_fn(launch),
            scratch_bytes: size_at(offset_of!(Self, scratch_bytes))?,
            draft_scratch_bytes: size_at(offset_of!(Self, draft_scratch_bytes))?,
            batch_scratch_bytes: size_at(offset_of!(Self, batch_scratch_bytes))?,
        })
    }
}

/// Weights and caches of a layer: device addresses, 0 where the model has no such weights.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LayerPointers {
    pub(super) attention_norm: u64,
    pub(super) attention_post_norm: u64,
    pub(super) mlp_norm: u64,
    pub(super) mlp_post_norm: u64,
    pub(super) query_norm: u64,
    pub(super) key_norm: u64,
    pub(super) qkv: u64,
    pub(super) o: u64,
    pub(super) gate_up: u64,
    pub(super) down: u64,
    pub(super) qkv_bias: u64,
    pub(super) o_bias: u64,
    pub(super) gate_up_bias: u64,
    pub(super) down_bias: u64,
    /// [slot, key-value heads, capacity, head size], as `values`.
    pub(super) keys: u64,
    pub(super) values: u64,
    /// Positions that a token sees, 0 for all.
    pub(super) window: i32,
    /// Index of its rotary tables.
    pub(super) rotary: i32,
    /// What tells of exits after it: see `exit_weights.rs`.
    pub(super) probe: u64,
    pub(super) lens: u64,
    pub(super) exit_head: u64,
}

/// A position that a pass takes through layers.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassRow {
    /// Its token; -1 where it starts from the hidden state saved for its position.
    pub token: i32,
    /// Its position.
    pub position: i32,
    /// Index of its sequence in the pass.
    pub sequence: i32,
    /// The first layer that it runs.
    pub first_layer: i32,
}

/// A sequence of a pass. Its rows are consecutive rows and positions; `first_layer` never grows
/// from one to the next.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SequenceRows {
    /// Its cache slot.
    pub slot: i32,
    /// Index of its first row.
    pub first_row: i32,
    /// Its number of rows.
    pub rows: i32,
    /// Whether caches of layers that it skips get what these make of the hidden states it exits with.
    pub fills: i32,
    /// Layers after which it stops at the latest: an exit layer, or all.
    pub max_depth: i32,
    /// Criteria of its exit rule, 0 without one.
    pub criteria: i32,
    /// Device address of [`Condition`]s, [criteria, layers].
    pub conditions: u64,
}

/// By what a token is sampled.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowRace {
    /// Of the position, see [`Race`](crate::sampler::Race).
    pub key: u64,
    /// What logits are multiplied by.
    pub inverse_temperature: f32,
    /// Padding.
    pub unused: i32,
}

/// The kernels' only parameter.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PassParameters {
    pub(super) layers: u64,
    pub(super) embed: u64,
    pub(super) head: u64,
    pub(super) final_norm: u64,
    /// [rotary tables, capacity, rotary size / 2], as `sin`.
    pub(super) cos: u64,
    pub(super) sin: u64,
    /// Hidden states at exits, [slot, capacity, hidden], fp32.
    pub(super) saved: u64,
    /// The pass's own set, all 0.
    pub(super) scratch: u64,
    /// The next pass's set, which this one clears.
    pub(super) next_scratch: u64,
    pub(super) tables: u64,
    /// [step, row, vocabulary], fp32.
    pub(super) logits: u64,
    /// Pinned memory of the host.
    pub(super) outcome: u64,
    pub(super) capacity: i32,
    pub(super) blocks: i32,
    pub(super) rows: i32,
    pub(super) sequences: i32,
    /// Rows of the pass before, whose traces `next_scratch` holds.
    pub(super) clear_rows: i32,
    /// Bit r: the logits of row r are wanted.
    pub(super) logits_rows: u32,
    pub(super) row: [PassRow; MAX_ROWS],
    pub(super) sequence: [SequenceRows; MAX_ROWS],
    /// By step and row.
    pub(super) race: [RowRace; MAX_ROWS],
    /// Bit r: the token of row r is sampled; its logits are wanted too.
    pub(super) sampled_rows: u32,
    /// Of its first step, counted over all passes.
    pub(super) number: u32,
    /// The most steps.
    pub(super) steps: i32,
    /// Whether there is a lens after a layer.
    pub(super) has_lenses: i32,
    /// Tokens of exit heads.
    pub(super) frequent_tokens: i32,
    /// Hidden states of a position that a trained drafter takes.
    pub(super) features: i32,
    /// The head's rows of exit heads' tokens, fp16 [tokens, hidden].
    pub(super) frequent_rows: u64,
    /// See [`Ahead`](crate::backend::Ahead).
    pub(super) min_accepted: [f32; MAX_AHEAD],
    pub(super) acceptance: [f32; MARGIN_BINS],
    /// [slot, capacity, features, hidden], bf16.
    pub(super) feature_states: u64,
    /// Layers after which they are taken; one more is padding.
    pub(super) feature_depths: [i32; 4],
    /// int32 [step, row], the tokens chosen; -1 where a logit is not finite.
    pub(super) chosen: u64,
}

/// Where a sequence of a pass stopped.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SequenceOutcome {
    /// Layers executed.
    pub depth: i32,
    /// The criterion that stopped it; -1 where none did.
    pub criterion: i32,
    /// Stability of the newest row's last layer.
    pub stability: f32,
    /// The entropy probe's risk there. It and the next ones are of no meaning where the rule does
    /// not ask for them.
    pub risk: f32,
    /// The exit head's margin.
    pub margin: f32,
    /// What its learned probe says.
    pub learned: f32,
    /// Its entropy.
    pub entropy: f32,
    /// Padding.
    pub unused: i32,
}

/// The logits of a row.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowOutcome {
    /// The token with the highest, the lowest of equals.
    pub token: u32,
    /// The highest.
    pub logit: f32,
    /// Whether all are finite.
    pub finite: i32,
    /// The probability of the most probable token less that of the second.
    pub margin: f32,
}

/// How the race of a row whose token is sampled ended, whatever filters keep.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RaceOutcome {
    /// The winner.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
    /// The sum of exp(logit - the highest) over all tokens.
    pub total: f32,
    /// Whether rounding cannot have made the token the winner.
    pub is_certain: i32,
}

/// What the host reads after a pass. What a step gives of a row, or of a sequence, is at the step's
/// index times their number, plus its own index.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PassOutcome {
    /// By step and sequence of the pass.
    pub sequence: [SequenceOutcome; MAX_ROWS],
    /// By step and row of the pass; of those only whose logits are wanted.
    pub row: [RowOutcome; MAX_ROWS],
    /// By step and row of the pass; of those only whose tokens are sampled.
    pub race: [RaceOutcome; MAX_ROWS],
    /// When it started, in nanoseconds of the device's clock.
    pub started: u64,
    /// When the last layer ended, by step.
    pub layers_ended: [u64; MAX_AHEAD],
    /// When the head ended, by step.
    pub ended: [u64; MAX_AHEAD],
    /// Steps that ran.
    pub steps: i32,
    /// Padding.
    pub unused: i32,
}

const _: () = {
    assert!(size_of::<ChainFacts>() == 288);
    assert!(size_of::<LayerPointers>() == 160);
    assert!(size_of::<PassRow>() == 16);
    assert!(size_of::<SequenceRows>() == 32);
    assert!(size_of::<RowRace>() == 16);
    assert!(size_of::<PassParameters>() == 760);
    assert!(size_of::<PassOutcome>() == 656);
    assert!(MAX_AHEAD == MAX_ROWS);
    assert!(size_of::<Condition>() == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_lie_as_the_struct_does() {
        let words = 1..=66_u32;
        let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        bytes.extend([67_u64, 68, 69].into_iter().flat_map(u64::to_le_bytes));
        let facts = ChainFacts::parse(&bytes).unwrap();
        assert_eq!(facts.shared_bytes, [6, 7, 8, 9]);
        assert_eq!(
            (facts.table_bytes, facts.saved_floats, facts.scratch_bytes),
            (13, 14, 67)
        );
        assert_eq!((facts.draft_rows, facts.draft_scratch_bytes), (20, 68));
        let last = BatchLaunch {
            threads: 63,
            shared_bytes: 64,
            rows: 65,
            blocks: 66,
        };
        assert_eq!(facts.batch[BATCH_KERNELS.len() - 1], last);
        assert_eq!(
            (
                facts.batch_pass_bytes,
                facts.batch_outcome_bytes,
                facts.batch_scratch_bytes
            ),
            (21, 22, 69)
        );
        assert_eq!(offset_of!(ChainFacts, scratch_bytes), 264);
        assert_eq!(offset_of!(ChainFacts, batch), 88);
        assert_eq!(offset_of!(ChainFacts, table_bytes), 48);
        assert_eq!(ChainFacts::parse(&bytes[1..]), None);
    }
}
