//! Steps, or parts of them, as batches: rows that are more than a pass takes, and run every layer.

use std::time::Duration;

use super::CudaChain;
use super::abi::RowRace;
use super::batch_abi::{BatchOutcome, BatchRow};
use super::chain_device::{BatchPlan, ChainDevice};
use super::lane::{Lane, Piece};
use super::outcomes::Rows;
use super::{note_filled, run_race};
use crate::backend::{Backend, EnginePart, EngineTiming, LogitsRequest, SequenceStep};
use crate::error::Result;
use crate::interrupt::Interrupt;

impl<D: ChainDevice> CudaChain<D> {
    /// Prefill what `lane` leaves to it next.
    pub(super) fn prefill(
        &mut self,
        lane: &mut Lane,
        step: &mut SequenceStep<'_>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let limits = self.device.batch_limits();
        while let Some(piece) = lane.take_prefill(limits.rows, limits.prefill_rows) {
            interrupt.check()?;
            let mut plan = BatchPlan::default();
            place(lane, &piece, step, &mut plan);
            let outcome = self.device.run_batch(&plan)?;
            self.take_batch(lane, &piece, &outcome, 0, step)?;
        }
        Ok(())
    }

    /// Run the next batch: rows of as many lanes as it holds.
    pub(super) fn run_batch(
        &mut self,
        lanes: &mut [Lane],
        steps: &mut [SequenceStep<'_>],
    ) -> Result<()> {
        let most = self.device.batch_limits().rows;
        let mut plan = BatchPlan::default();
        let mut placed = Vec::new();
        for (index, lane) in lanes.iter_mut().enumerate() {
            if let Some(piece) = lane.take_for_batch(most - plan.rows.len()) {
                let first = plan.logits_rows.len();
                place(lane, &piece, &steps[index], &mut plan);
                placed.push((index, piece, first));
            }
        }
        let outcome = self.device.run_batch(&plan)?;
        for (index, piece, first) in placed {
            self.take_batch(
                &mut lanes[index],
                &piece,
                &outcome,
                first,
                &mut steps[index],
            )?;
        }
        Ok(())
    }

    /// Take what a batch gave `piece`, whose logits rows are those from number `first` on.
    fn take_batch(
        &mut self,
        lane: &mut Lane,
        piece: &Piece,
        outcome: &BatchOutcome,
        first: usize,
        step: &mut SequenceStep<'_>,
    ) -> Result<()> {
        let layers = self.num_layers();
        let epoch = *self.epoch.get_or_insert(outcome.started);
        lane.timings.extend(timings(piece, outcome, epoch, layers));
        note_filled(lane, piece, step.sequence, layers);
        let rows = Rows {
            row: &outcome.row,
            race: &outcome.race,
        };
        self.take_logits(lane, piece, lane.exit, (rows, first), &step.logits)
    }
}

/// Append `piece` of `lane` to `plan`.
fn place(lane: &Lane, piece: &Piece, step: &SequenceStep<'_>, plan: &mut BatchPlan) {
    let slot = step.sequence.slot() as i32;
    for row in piece.rows.clone() {
        if piece.wanted.contains(&row) {
            plan.logits_rows.push(plan.rows.len());
            plan.races.push(race(lane, row, step));
        }
        plan.rows.push(BatchRow {
            token: lane.rows[row].token,
            position: lane.rows[row].position,
            slot,
        });
    }
}

/// By what the token of the lane's row number `row` is sampled, if it is.
fn race(lane: &Lane, row: usize, step: &SequenceStep<'_>) -> Option<RowRace> {
    match &step.logits {
        LogitsRequest::Sampled(race) => Some(run_race(race, lane.later(row, 0))),
        _ => None,
    }
}

/// The parts of a batch through `layers` layers, by a clock that began at `epoch`.
fn timings(
    piece: &Piece,
    outcome: &BatchOutcome,
    epoch: u64,
    layers: usize,
) -> impl Iterator<Item = EngineTiming> {
    let timing = |part, tokens, from: u64, to: u64| EngineTiming {
        part,
        tokens,
        start: Duration::from_nanos(from.saturating_sub(epoch)),
        elapsed: Duration::from_nanos(to.saturating_sub(from)),
    };
    let (rows, wanted) = (piece.rows.len(), piece.wanted.len());
    let (started, layers_ended) = (outcome.started, outcome.layers_ended);
    let of_layers = timing(EnginePart::Layers(0..layers), rows, started, layers_ended);
    let of_head = timing(EnginePart::Head, wanted, layers_ended, outcome.ended);
    [of_layers]
        .into_iter()
        .chain((wanted > 0).then_some(of_head))
}
