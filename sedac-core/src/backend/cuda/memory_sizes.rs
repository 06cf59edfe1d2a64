//! What a chain takes of a GPU's memory.

use super::batch_abi::BATCH_LOGITS_ROWS;
use super::compiled_chain::CompiledChain;
use super::rule_memory::RuleMemory;
use super::slot_memory::SlotSizes;
use crate::bundle::ChainKernels;

/// Bytes of a logit, and of a number of saved hidden states.
const FLOAT: u64 = size_of::<f32>() as u64;

/// Bytes of what a chain takes beside its weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemorySizes {
    pub(super) slots: SlotSizes,
    pub(super) vocabulary: usize,
    pub(super) tables: u64,
    /// Each of two sets.
    pub(super) scratch: u64,
    batch_scratch: u64,
}

impl MemorySizes {
    /// For `sequences` slots of `capacity` positions.
    pub(super) fn new(
        kernels: &ChainKernels,
        chain: &CompiledChain,
        capacity: usize,
        sequences: usize,
    ) -> Self {
        let shape = kernels.shape;
        Self {
            slots: SlotSizes {
                slots: sequences,
                capacity,
                layers: shape.layers,
                key_value_heads: shape.key_value_heads,
                head_size: shape.head_size,
                saved_bytes: u64::from(chain.facts.saved_floats) * FLOAT,
            },
            vocabulary: shape.vocabulary,
            tables: u64::from(chain.facts.table_bytes) * u64::from(chain.blocks),
            scratch: chain.facts.scratch_bytes,
            batch_scratch: chain.facts.batch_scratch_bytes,
        }
    }

    /// Numbers of all rows' logits.
    pub(super) fn logits(&self) -> usize {
        BATCH_LOGITS_ROWS * self.vocabulary
    }

    /// All of them.
    pub(super) fn total(&self) -> u64 {
        self.slots.total()
            + self.tables
            + 2 * self.scratch
            + self.batch_scratch
            + RuleMemory::bytes(self.slots.layers)
            + self.logits() as u64 * FLOAT
    }
}
