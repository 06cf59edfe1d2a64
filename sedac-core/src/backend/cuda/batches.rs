//! Steps, or parts of them, as batches: rows that are more than a pass takes, and run every layer, as
//! some of so many do anyway.

use std::time::{Duration, Instant};

use super::CudaChain;
use super::abi::RowRace;
use super::batch_abi::{BatchOutcome, BatchRow, RowRule};
use super::chain_device::{BatchLimits, BatchPlan, ChainDevice};
use super::lane::{Lane, Piece};
use super::outcomes::Rows;
use super::{note_filled, run_race};
use crate::backend::{Backend, EnginePart, EngineTiming, LogitsRequest, SequenceStep};
use crate::error::Result;
use crate::policy::ExitRule;

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
            self.place_in_batch(&lanes[*lane], piece, &steps[*lane], &mut plan)?;
        }
        let placed = pieces.iter().zip(&first_logits_rows);
        let placed = placed.map(|((lane, piece), &first)| (*lane, piece, first));
        plan.drafts = self.next_drafts(placed, lanes, steps);
        self.end_drafts(plan.rows.iter().map(|row| row.slot))?;
        let before = Instant::now();
        let outcome = self.device.run_batch(&plan)?;
        self.begin_drafts(std::mem::take(&mut plan.drafts));
        self.note_batch(&plan, &outcome, before.elapsed());
        for ((lane, piece), first) in pieces.into_iter().zip(first_logits_rows) {
            self.take_batch(
                &mut lanes[lane],
                &piece,
                (&plan, &outcome),
                first,
                &mut steps[lane],
            )?;
        }
        Ok(())
    }

    /// Append `piece` of `lane` to `plan`.
    fn place_in_batch(
        &mut self,
        lane: &Lane,
        piece: &Piece,
        step: &SequenceStep<'_>,
        plan: &mut BatchPlan,
    ) -> Result<()> {
        let slot = step.sequence.slot() as i32;
        for row in piece.rows.clone() {
            if piece.wanted.contains(&row) {
                plan.logits_rows.push(plan.rows.len());
                plan.races.push(race(lane, row, step));
                plan.rules.push(match step.rule {
                    Some(rule) => Some(self.row_rule(rule, lane.fills)?),
                    None => None,
                });
            }
            plan.rows.push(BatchRow {
                token: lane.rows[row].token,
                position: lane.rows[row].position,
                slot,
            });
        }
        Ok(())
    }

    fn row_rule(&mut self, rule: &ExitRule, freezes: bool) -> Result<RowRule> {
        Ok(RowRule {
            conditions: self.write_conditions(rule)?,
            criteria: rule.criteria().len() as i32,
            freezes: freezes.into(),
        })
    }

    /// Whether rows of a batch may exit by `rule`.
    pub(super) fn decides_in_batches(&self, rule: &ExitRule) -> bool {
        let signals = rule
            .criteria()
            .iter()
            .flat_map(|criterion| &criterion.conditions);
        self.device.batch_limits().rules
            && signals
                .map(|row| row.signal)
                .all(|signal| !signal.is_of_exit_head())
    }

    /// Note what a batch cost that the host saw run for `elapsed`, if a draft may be verified in one
    /// like it: all of its rows may want logits.
    fn note_batch(&mut self, plan: &BatchPlan, outcome: &BatchOutcome, elapsed: Duration) {
        if plan.rows.len() > self.device.batch_limits().logits_rows {
            return;
        }
        let (layers, head) = (of_layers(outcome), of_head(outcome));
        let (num_layers, rows) = (self.num_layers(), plan.rows.len());
        self.costs.note_layers(num_layers, rows, layers);
        if !plan.logits_rows.is_empty() {
            let host = elapsed.saturating_sub(layers + head);
            self.costs.note_head(plan.logits_rows.len(), head + host);
        }
    }

    /// Take what a batch gave `piece`, whose logits rows are those from number `first` on.
    fn take_batch(
        &mut self,
        lane: &mut Lane,
        piece: &Piece,
        (plan, outcome): (&BatchPlan, &BatchOutcome),
        first: usize,
        step: &mut SequenceStep<'_>,
    ) -> Result<()> {
        let layers = self.num_layers();
        let epoch = *self.epoch.get_or_insert(outcome.started);
        lane.timings.extend(timings(plan, outcome, epoch, layers));
        note_filled(lane, piece, step.sequence, layers);
        if step.rule.is_some() && piece.is_last {
            let found = outcome.exit[first];
            lane.exit = self.exit(piece, step.rule, (found.depth, found.criterion))?;
        }
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

/// By what the token of the lane's row number `row` is sampled, if it is.
fn race(lane: &Lane, row: usize, step: &SequenceStep<'_>) -> Option<RowRace> {
    match &step.logits {
        LogitsRequest::Sampled(race) => Some(run_race(race, lane.later(row, 0))),
        _ => None,
    }
}

/// The time for all layers.
fn of_layers(outcome: &BatchOutcome) -> Duration {
    Duration::from_nanos(outcome.layers_ended.saturating_sub(outcome.started))
}

/// The time for logits, where these are wanted.
fn of_head(outcome: &BatchOutcome) -> Duration {
    Duration::from_nanos(outcome.ended.saturating_sub(outcome.layers_ended))
}

/// The parts of a batch through `layers` layers, by a clock that began at `epoch`.
fn timings(
    plan: &BatchPlan,
    outcome: &BatchOutcome,
    epoch: u64,
    layers: usize,
) -> impl Iterator<Item = EngineTiming> {
    let start = Duration::from_nanos(outcome.started.saturating_sub(epoch));
    let layers = EngineTiming {
        part: EnginePart::Layers(0..layers),
        tokens: plan.rows.len(),
        start,
        elapsed: of_layers(outcome),
    };
    let head = EngineTiming {
        part: EnginePart::Head,
        tokens: plan.logits_rows.len(),
        start: start + layers.elapsed,
        elapsed: of_head(outcome),
    };
    let has_head = head.tokens > 0;
    [layers].into_iter().chain(has_head.then_some(head))
}
