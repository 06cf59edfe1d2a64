//! Steps, or parts of them, as batches: rows that are more than a pass takes, and run every layer.

use std::time::Duration;

use super::CudaChain;
use super::abi::RowRace;
use super::batch_abi::{BatchOutcome, BatchRow};
use super::chain_device::{BatchLimits, BatchPlan, ChainDevice};
use super::lane::{Lane, Piece};
use super::outcomes::Rows;
use super::{note_filled, run_race};
use crate::backend::{Backend, EnginePart, EngineTiming, LogitsRequest, SequenceStep};
use crate::error::Result;

impl<D: ChainDevice> CudaChain<D> {
    /// Run the next batch: rows of as many lanes as it holds.
    pub(super) fn run_batch(
        &mut self,
        lanes: &mut [Lane],
        steps: &mut [SequenceStep<'_>],
    ) -> Result<()> {
        let mut pieces = take_pieces(lanes, self.device.batch_limits());
        // lanes with one row each come first
        pieces.sort_by_key(|(_, piece)| piece.rows.len() > 1);
        let mut plan = BatchPlan::default();
        let mut first_logits_rows = Vec::new();
        for (lane, piece) in &pieces {
            first_logits_rows.push(plan.logits_rows.len());
            place(&lanes[*lane], piece, &steps[*lane], &mut plan);
        }
        let outcome = self.device.run_batch(&plan)?;
        for ((lane, piece), first) in pieces.into_iter().zip(first_logits_rows) {
            self.take_batch(&mut lanes[lane], &piece, &outcome, first, &mut steps[lane])?;
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

/// What a batch takes next, each of the lane of that number.
fn take_pieces(lanes: &mut [Lane], limits: BatchLimits) -> Vec<(usize, Piece)> {
    let (mut room, mut logits_room) = (limits.rows, limits.logits_rows);
    let mut pieces = Vec::new();
    for (index, lane) in lanes.iter_mut().enumerate() {
        if let Some(piece) = lane.take_for_batch(room, logits_room) {
            room -= piece.rows.len();
            logits_room -= piece.wanted.len();
            pieces.push((index, piece));
        }
    }
    pieces
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
