//! Batches on a GPU: one kernel, or with many rows a kernel for each stage of a layer.

use std::collections::BTreeSet;
use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, PinnedHostSlice, PushKernelArg,
    ValidAsZeroBits,
};

use super::abi::{PassParameters, RowRace, divides_anew};
use super::batch_abi::{
    ATTENTION, BATCH_GROUP_ROWS, BATCH_LAYER, BATCH_LOGITS_ROWS, BATCH_ROWS, BatchOutcome,
    BatchParameters, BatchRow, HEAD, PREFILL_ATTENTION, RowRule, SMALL_BATCH_ROWS, START, WHOLE,
};
use super::chain_device::BatchPlan;
use super::compiled_chain::CompiledChain;
use super::memory::{pinned, zeros};
use super::slot_memory::SlotSizes;
use crate::backend::gpu::failed;
use crate::error::Result;

// SAFETY: it is repr(C) of integers, and lies in the parameter as the kernels' struct does, whose
// size was compared.
unsafe impl DeviceRepr for BatchParameters {}
// SAFETY: it is repr(C) of integers and floats, as the kernels' struct, whose size was compared.
unsafe impl DeviceRepr for BatchOutcome {}
// SAFETY: it is of integers and floats, to which all bits 0 are a value.
unsafe impl ValidAsZeroBits for BatchOutcome {}
// SAFETY: it is repr(C) of integers and a float, as the kernels' struct.
unsafe impl DeviceRepr for RowRace {}
// SAFETY: it is of integers and a float, to which all bits 0 are a value.
unsafe impl ValidAsZeroBits for RowRace {}

// SAFETY: it is repr(C) of integers, as the kernels' struct.
unsafe impl DeviceRepr for RowRule {}
// SAFETY: it is of integers, to which all bits 0 are a value.
unsafe impl ValidAsZeroBits for RowRule {}

/// What the kernels of batches exchange, and what they read and write of the host's.
pub(super) struct BatchMemory {
    scratch: CudaSlice<u8>,
    outcome: PinnedHostSlice<BatchOutcome>,
    races: PinnedHostSlice<RowRace>,
    rules: PinnedHostSlice<RowRule>,
}

impl BatchMemory {
    pub(super) fn allocate(stream: &Arc<CudaStream>, chain: &CompiledChain) -> Result<Self> {
        Ok(Self {
            scratch: zeros(stream, chain.facts.batch_scratch_bytes)?,
            outcome: pinned(stream, 1, BatchOutcome::default())?,
            races: pinned(stream, BATCH_LOGITS_ROWS, RowRace::default())?,
            rules: pinned(stream, BATCH_LOGITS_ROWS, RowRule::default())?,
        })
    }

    /// Launch `plan` by the weights and caches of `passes`, for a model that knows `vocabulary` tokens.
    /// Whoever calls this waits until it has ended, whatever the driver says here.
    pub(super) fn launch(
        &mut self,
        stream: &Arc<CudaStream>,
        chain: &CompiledChain,
        passes: &PassParameters,
        (sizes, vocabulary): (&SlotSizes, usize),
        plan: &BatchPlan,
    ) -> Result<()> {
        check(sizes, vocabulary, plan);
        write(&mut self.races, &plan.races)?;
        write(&mut self.rules, &plan.rules)?;
        let parameters = self.parameters(stream, passes, plan)?;
        launch(stream, chain, &parameters, sizes.layers).map_err(failed("a batch"))
    }

    /// What came of the last batch, which has ended.
    pub(super) fn outcome(&self) -> Result<BatchOutcome> {
        let outcome = self.outcome.as_slice().map_err(failed("a batch"))?;
        Ok(outcome[0])
    }

    fn parameters(
        &self,
        stream: &Arc<CudaStream>,
        passes: &PassParameters,
        plan: &BatchPlan,
    ) -> Result<BatchParameters> {
        let mut row = [BatchRow::default(); BATCH_ROWS];
        row[..plan.rows.len()].copy_from_slice(&plan.rows);
        let mut logits_row = [0; BATCH_LOGITS_ROWS];
        for (place, &wanted) in logits_row.iter_mut().zip(&plan.logits_rows) {
            *place = wanted as u16;
        }
        let single_rows = single_rows(&plan.rows);
        let first_rows = groups(&plan.rows, single_rows);
        let mut group = [0; BATCH_ROWS];
        group[..first_rows.len()].copy_from_slice(&first_rows);
        let outcome = self.outcome.as_ptr().map_err(failed("pinned memory"))?;
        let races = self.races.as_ptr().map_err(failed("pinned memory"))?;
        let rules = self.rules.as_ptr().map_err(failed("pinned memory"))?;
        Ok(BatchParameters {
            layers: passes.layers,
            embed: passes.embed,
            head: passes.head,
            final_norm: passes.final_norm,
            cos: passes.cos,
            sin: passes.sin,
            scratch: self.scratch.device_ptr(stream).0,
            logits: passes.logits,
            outcome: outcome as u64,
            races: races as u64,
            rules: rules as u64,
            feature_states: passes.feature_states,
            chosen: passes.chosen,
            sampled: present(&plan.races),
            deciding: present(&plan.rules),
            capacity: passes.capacity,
            blocks: passes.blocks,
            features: passes.features,
            feature_depths: passes.feature_depths,
            rows: plan.rows.len() as i32,
            logits_rows: plan.logits_rows.len() as i32,
            single_rows: single_rows as i32,
            groups: first_rows.len() as i32,
            row,
            logits_row,
            group,
        })
    }
}

/// Write those of `each` that there are to their places.
fn write<T: Copy + ValidAsZeroBits>(
    places: &mut PinnedHostSlice<T>,
    each: &[Option<T>],
) -> Result<()> {
    let places = places.as_mut_slice().map_err(failed("a batch"))?;
    for (place, each) in places.iter_mut().zip(each) {
        if let Some(each) = each {
            *place = *each;
        }
    }
    Ok(())
}

/// Bit i: there is a number i.
fn present<T>(each: &[Option<T>]) -> u64 {
    let there = each.iter().enumerate().filter(|(_, each)| each.is_some());
    there.fold(0, |bits, (index, _)| bits | 1 << index)
}

/// Launch all kernels of a batch through `layers` layers.
fn launch(
    stream: &Arc<CudaStream>,
    chain: &CompiledChain,
    parameters: &BatchParameters,
    layers: usize,
) -> std::result::Result<(), DriverError> {
    let launch = |index: usize, layer: i32, stage: i32| {
        let rows = match index {
            PREFILL_ATTENTION => parameters.groups,
            ATTENTION => parameters.single_rows,
            HEAD => parameters.logits_rows,
            _ => parameters.rows,
        };
        if rows == 0 {
            return Ok(());
        }
        let (kernel, config) = chain.batch_kernel(index, rows as usize);
        let mut launch = stream.launch_builder(kernel);
        launch.arg(parameters).arg(&layer).arg(&stage);
        // SAFETY: these are the kernel's parameters, the first of the size that its facts say. What it
        // points to is allocated for the sizes that the bundle's manifest and facts give, and `check`
        // has made sure that slots, positions and tokens are inside, and the driver that rules lie in
        // the tables that it keeps. It lives until the kernels have ended, which is waited for whatever
        // the driver says here. Those whose blocks wait for each other are cooperative.
        let launched = unsafe {
            match index {
                HEAD | WHOLE => launch.launch_cooperative(config),
                _ => launch.launch(config),
            }
        };
        launched.map(drop)
    };
    if parameters.rows as usize <= SMALL_BATCH_ROWS {
        return launch(WHOLE, 0, 0);
    }
    launch(START, 0, 0)?;
    for layer in 0..layers as i32 {
        for (index, stage) in BATCH_LAYER {
            launch(index, layer, stage)?;
        }
    }
    launch(HEAD, 0, 0)
}

fn follows(row: &BatchRow, before: &BatchRow) -> bool {
    row.slot == before.slot && row.position == before.position + 1
}

/// The number of first rows that no other of their sequence follows.
fn single_rows(rows: &[BatchRow]) -> usize {
    let next = rows.windows(2).position(|pair| follows(&pair[1], &pair[0]));
    next.unwrap_or(rows.len())
}

/// The first row of each group of those from `start` on.
fn groups(rows: &[BatchRow], start: usize) -> Vec<u16> {
    let mut groups = Vec::new();
    let together =
        |before: &_, row: &_| follows(row, before) && !divides_anew(row.position as usize);
    let of_sequences = rows[start..].chunk_by(together);
    let mut first = start;
    for of_sequence in of_sequences {
        let end = first + of_sequence.len();
        groups.extend((first..end).step_by(BATCH_GROUP_ROWS).map(|row| row as u16));
        first = end;
    }
    groups
}

/// Check that a batch stays inside of what was allocated.
///
/// # Panics
/// When it does not.
fn check(sizes: &SlotSizes, vocabulary: usize, plan: &BatchPlan) {
    let below = |value: i32, limit: usize| usize::try_from(value).is_ok_and(|value| value < limit);
    let (rows, wanted) = (&plan.rows, &plan.logits_rows);
    assert!((1..=BATCH_ROWS).contains(&rows.len()), "rows of a batch");
    assert!(wanted.len() <= BATCH_LOGITS_ROWS && plan.races.len() == wanted.len());
    assert_eq!(plan.rules.len(), wanted.len(), "rules of a batch");
    assert!(wanted.iter().all(|&row| row < rows.len()), "logits rows");
    let sequences = rows.chunk_by(|before, row| follows(row, before));
    let slots: BTreeSet<_> = sequences.clone().map(|rows| rows[0].slot).collect();
    // attention of a small batch finds a sequence's other rows before its own
    assert_eq!(
        slots.len(),
        sequences.count(),
        "a sequence's rows in a batch"
    );
    for plan in &plan.drafts {
        let first = plan.verifying_row.expect("drafts follow what verifies");
        assert!(first + plan.positions() <= wanted.len(), "rows that verify");
    }
    for row in rows {
        assert!(below(row.token, vocabulary) && below(row.slot, sizes.slots));
        assert!(below(row.position, sizes.capacity), "positions of a batch");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_follow_each_other_share_attention() {
        let lengths = [1, 1, 11, 1, 8];
        let rows: Vec<_> = lengths
            .into_iter()
            .enumerate()
            .flat_map(|(slot, length)| {
                (0..length).map(move |position| BatchRow {
                    token: 0,
                    position,
                    slot: slot as i32,
                })
            })
            .collect();
        assert_eq!(single_rows(&rows), 2);
        assert_eq!(groups(&rows, 2), [2, 10, 13, 14]);
        assert_eq!((single_rows(&rows[..2]), single_rows(&rows[2..])), (2, 0));
        assert!(groups(&rows[..2], 2).is_empty());
        // the last group of a full batch begins beyond what a byte holds
        let full: Vec<_> = (0..BATCH_ROWS as i32)
            .map(|position| BatchRow {
                position,
                ..rows[2]
            })
            .collect();
        assert_eq!(groups(&full, 0).last(), Some(&504));
        // attention divides keys anew at 2048
        let later = |position| BatchRow {
            position: position + 2044,
            ..rows[2]
        };
        let rows: Vec<_> = (0..10).map(later).collect();
        assert_eq!(groups(&rows, 0), [0, 4]);
    }
}
