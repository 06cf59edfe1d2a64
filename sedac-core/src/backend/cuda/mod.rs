//! The whole chain in one kernel: embedding, layers, exits, head and the choice of tokens.
//!
//! The kernel takes passes of up to [`MAX_ROWS`] rows, of one sequence or of several, and decides
//! about exits by the rule's table. More rows than that are batches, which have kernels of their own
//! and go through every layer. This backend turns steps into passes and batches and keeps the books; the
//! [`ChainDevice`] runs them.

mod abi;
mod batch_abi;
mod batch_memory;
mod batches;
mod chain_device;
mod compiled_chain;
mod draft_abi;
mod draft_memory;
mod drafter_weights;
mod drafting;
mod driver;
mod exit_memory;
mod exit_weights;
mod lane;
mod memory;
mod memory_sizes;
mod outcomes;
mod packed_weights;
mod pass_check;
mod pass_costs;
mod rule_memory;
mod rule_tables;
mod slot_memory;

use std::time::Instant;

pub use self::abi::{
    MAX_ROWS, PassOutcome, PassRow, RaceOutcome, RowOutcome, RowRace, SequenceOutcome, SequenceRows,
};
use self::batch_abi::BATCH_LOGITS_ROWS;
pub use self::batch_abi::{BatchOutcome, BatchRow, RowExit, RowRule};
pub use self::chain_device::{
    BatchLimits, BatchPlan, ChainDevice, DraftPlan, FollowingDraft, MAX_CRITERIA, MAX_DRAFTS,
    MAX_RACES, MAX_TABLES, PassPlan,
};
use self::drafting::Following;
pub use self::driver::CudaDriver;
use self::lane::{Lane, Piece};
use self::outcomes::Rows;
use self::pass_costs::PassCost;
use self::rule_tables::RuleTables;
use super::profile;
use super::{
    Ahead, Backend, Capabilities, Costs, DraftEngine, LogitsRequest, MAX_AHEAD, SequenceStep,
    StepExit, StepOutcome,
};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::{Condition, Criterion, ExitRule, Signal};
use crate::sampler::Race;
use crate::sequence::{Sequence, Slots};

/// Turns steps into passes and batches of a device.
#[derive(Debug)]
pub struct CudaChain<D> {
    device: D,
    /// By depth, from 0 to full depth, whether tokens may exit there.
    exit_allowed: Vec<bool>,
    capacity: usize,
    capabilities: Capabilities,
    slots: Slots,
    costs: Costs,
    tables: RuleTables,
    /// The device's clock at the first pass.
    epoch: Option<u64>,
    following: Following,
}

/// Sequences that run at once unless another number is asked for: a batch gives the logits of so many
/// rows. (SmolLM2-135M, tokens a second of 32 and of 64 at once: full depth 26,744 and 35,655, lossless
/// 26,066 and 33,089.)
const USUAL_SEQUENCES: usize = BATCH_LOGITS_ROWS;

/// Rows of prompts that other sequences wait for at most; a batch may have more of them.
const PREFILL_CHUNK: usize = 256;

/// A piece in a pass.
struct Placed {
    lane: usize,
    piece: Piece,
    /// Index of its first row in the pass.
    first_row: usize,
}

impl Placed {
    /// Index of the first of its rows whose logits are wanted.
    fn first_logits(&self) -> usize {
        self.first_row + self.piece.wanted.start - self.piece.rows.start
    }
}

impl<D: ChainDevice> CudaChain<D> {
    /// Run a model of `layers` layers on `device`, with exits allowed after the depths
    /// `exit_layers` and `sequences` slots of `capacity` positions.
    pub fn new(
        device: D,
        layers: usize,
        exit_layers: &[usize],
        capacity: usize,
        sequences: usize,
    ) -> Self {
        Self {
            exit_allowed: (0..=layers)
                .map(|depth| depth < layers && exit_layers.contains(&depth))
                .collect(),
            capacity,
            capabilities: Capabilities {
                sequences,
                shares_passes: true,
                shares_drafts: true,
                probes: device.probes().to_vec(),
                exit_heads: device.exit_heads().to_vec(),
                margins: true,
                trained_drafter: device.draft_rows() > 0,
                drafts_at_once: MAX_DRAFTS,
                ahead: MAX_AHEAD,
                prefill_chunk: Capabilities::PREFILL_CHUNK
                    .max(device.batch_limits().rows.min(PREFILL_CHUNK)),
                ..Capabilities::default()
            },
            slots: Slots::new(sequences),
            costs: Costs::of_passes(MAX_ROWS, device.batch_limits().logits_rows.max(MAX_ROWS)),
            tables: RuleTables::default(),
            epoch: None,
            following: Following::default(),
            device,
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The depth at which a step of `max_depth` layers ends at the latest.
    fn limit(&self, max_depth: usize) -> usize {
        let layers = self.num_layers();
        let mut depths = max_depth..layers;
        depths
            .find(|&depth| self.exit_allowed[depth])
            .unwrap_or(layers)
    }

    /// Run the next pass: pieces of as many lanes as it holds.
    fn run_pass(&mut self, lanes: &mut [Lane], steps: &mut [SequenceStep<'_>]) -> Result<PassCost> {
        let mut pass = PassPlan::default();
        let mut placed = Vec::new();
        let pieces_left = lanes.iter().any(Lane::has_pieces);
        let is_awaited = lanes.iter().any(Lane::joins_later);
        for (index, lane) in lanes.iter_mut().enumerate() {
            let room = MAX_ROWS - pass.rows.len();
            if let Some(piece) = lane.take_piece(room, pieces_left, is_awaited) {
                placed.push(self.place(index, lane, piece, &steps[index], &mut pass)?);
            }
        }
        let running = lanes.iter().filter(|lane| !lane.rows.is_empty());
        if placed.len() == running.count() {
            // others would wait meanwhile
            pass.ahead = shared_ahead(placed.iter().map(|placed| &lanes[placed.lane].ahead));
        }
        for placed in &placed {
            place_races(placed, &lanes[placed.lane], &steps[placed.lane], &mut pass);
        }
        let pieces = placed
            .iter()
            .map(|placed| (placed.lane, &placed.piece, placed.first_logits()));
        pass.drafts = self.next_drafts(pieces, lanes, steps);
        self.end_drafts(pass.sequences.iter().map(|sequence| sequence.slot))?;
        let before = Instant::now();
        let outcome = self.device.run(&pass)?;
        let cost = PassCost::new(&pass, &outcome, self.num_layers(), before.elapsed());
        self.begin_drafts(std::mem::take(&mut pass.drafts));
        let epoch = *self.epoch.get_or_insert(outcome.started);
        for (sequence, placed) in placed.into_iter().enumerate() {
            let first_logits = placed.first_logits();
            let Placed {
                lane,
                piece,
                first_row,
            } = placed;
            let (lane, step) = (&mut lanes[lane], &mut steps[lane]);
            let of_sequence = outcome.sequence[sequence];
            let found = (of_sequence.depth, of_sequence.criterion);
            let exit = self.exit(&piece, step.rule, found)?;
            lane.timings.extend(cost.timings(epoch, sequence));
            note_filled(lane, &piece, step.sequence, self.filled(lane, exit));
            let found = Rows {
                row: &outcome.row,
                race: &outcome.race,
            };
            self.take_logits(lane, &piece, exit, (found, first_logits), &step.logits)?;
            lane.exit = exit;
            lane.exit_signals = self.exit_signals(&piece, step.rule, of_sequence);
            let rows = first_row..pass.rows.len();
            self.take_further_steps(lane, &piece, rows, &outcome, step)?;
        }
        Ok(cost)
    }

    /// The layers whose caches hold a token of `lane` after `exit`.
    fn filled(&self, lane: &Lane, exit: StepExit) -> usize {
        match lane.fills {
            true => self.num_layers(),
            false => exit.layer,
        }
    }

    /// Append `piece` of `lane` to `pass`.
    fn place(
        &mut self,
        index: usize,
        lane: &Lane,
        piece: Piece,
        step: &SequenceStep<'_>,
        pass: &mut PassPlan,
    ) -> Result<Placed> {
        let (sequence, first_row) = (pass.sequences.len(), pass.rows.len());
        let rule = step.rule.filter(|_| piece.is_last);
        pass.sequences.push(SequenceRows {
            slot: step.sequence.slot() as i32,
            first_row: first_row as i32,
            rows: piece.rows.len() as i32,
            fills: lane.fills.into(),
            max_depth: lane.limit as i32,
            criteria: rule.map_or(0, |rule| rule.criteria().len() as i32),
            conditions: rule.map_or(Ok(0), |rule| self.write_conditions(rule))?,
        });
        let rows = lane.rows[piece.rows.clone()].iter();
        pass.rows.extend(rows.map(|&row| PassRow {
            sequence: sequence as i32,
            ..row
        }));
        for row in piece.wanted.clone() {
            let in_pass = first_row + row - piece.rows.start;
            pass.logits_rows |= 1 << in_pass;
            if let LogitsRequest::Sampled(_) = &step.logits {
                pass.sampled_rows |= 1 << in_pass;
            }
        }
        Ok(Placed {
            lane: index,
            piece,
            first_row,
        })
    }

    /// Where the device has the table of `rule`.
    fn write_conditions(&mut self, rule: &ExitRule) -> Result<u64> {
        let conditions = self.table(rule);
        self.tables.find_or_write(&mut self.device, conditions)
    }

    /// The conditions of `rule`, [criteria, layers], which let tokens exit where the bundle does.
    fn table(&self, rule: &ExitRule) -> Vec<Condition> {
        let criteria = rule.criteria();
        assert!(!rule.is_soft(), "exits are hard, as capabilities say");
        assert!(criteria.len() <= MAX_CRITERIA, "a rule has few criteria");
        let depths = |criterion| (1..=self.num_layers()).map(move |depth| (criterion, depth));
        let rows = criteria.iter().flat_map(depths);
        rows.map(|(criterion, depth)| self.condition(criterion, depth))
            .collect()
    }

    /// The row of `criterion` for `depth`; one that compares nothing where its signal is not measured.
    fn condition(&self, criterion: &Criterion, depth: usize) -> Condition {
        let condition = criterion.conditions.get(depth - 1);
        let allowed = self.exit_allowed[depth];
        let measured = |condition: &&Condition| match condition.signal {
            Signal::None | Signal::Stability => true,
            Signal::Risk => allowed && self.capabilities.probes.contains(&depth),
            Signal::Margin | Signal::Learned => {
                allowed && self.capabilities.exit_heads.contains(&depth)
            }
        };
        let condition = condition.copied().filter(|row| measured(&row));
        let condition = condition.unwrap_or_default();
        Condition {
            may_exit: condition.may_exit & u32::from(allowed),
            ..condition
        }
    }

    fn run(
        &mut self,
        lanes: &mut [Lane],
        steps: &mut [SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<()> {
        let mut passes = Vec::new();
        let has_batches = self.device.batch_limits().rows > 0;
        while lanes.iter().any(Lane::is_open) {
            interrupt.check()?;
            let rows: usize = lanes.iter().map(Lane::rows_for_batch).sum();
            if has_batches && rows > MAX_ROWS && !lanes.iter().any(Lane::joins_later) {
                self.run_batch(lanes, steps)?;
            } else {
                passes.push(self.run_pass(lanes, steps)?);
            }
        }
        pass_costs::note(&mut self.costs, &passes);
        Ok(())
    }
}

/// How far a pass goes on whose lanes can go on as `each` says: all of them, or none.
fn shared_ahead<'a>(mut each: impl ExactSizeIterator<Item = &'a Ahead> + Clone) -> Ahead {
    let (count, tokens) = (each.len(), each.clone().map(|ahead| ahead.tokens).min());
    let tokens = tokens.unwrap_or(1).min(MAX_ROWS / count.max(1));
    match each.next() {
        Some(&ahead) if count == 1 => ahead,
        Some(_) => Ahead::of(tokens),
        None => Ahead::default(),
    }
}

/// Write the races of the sampled rows of `placed`, of each step, to `pass`.
fn place_races(placed: &Placed, lane: &Lane, step: &SequenceStep<'_>, pass: &mut PassPlan) {
    let LogitsRequest::Sampled(race) = &step.logits else {
        return;
    };
    for index in 0..pass.ahead.tokens {
        for row in placed.piece.wanted.clone() {
            let in_pass = placed.first_row + row - placed.piece.rows.start;
            pass.races[index * pass.rows.len() + in_pass] = run_race(race, lane.later(row, index));
        }
    }
}

/// How the device runs the race of the position that `later` others follow.
fn run_race(race: &Race, later: usize) -> RowRace {
    RowRace {
        key: race.key(later),
        inverse_temperature: 1.0 / race.temperature(),
        unused: 0,
    }
}

/// Note that caches of the layers up to `depth` hold the rows of `piece`.
fn note_filled(lane: &Lane, piece: &Piece, sequence: &mut Sequence, depth: usize) {
    let newest = lane.rows[piece.rows.end - 1];
    for layer in newest.first_layer as usize..depth {
        sequence.kv_mut().fill(layer, newest.position as usize + 1);
    }
}

impl<D: ChainDevice> Backend for CudaChain<D> {
    fn num_layers(&self) -> usize {
        self.exit_allowed.len() - 1
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn usual_slots(&self) -> Result<usize> {
        let slots = self.device.room()?.max(self.capabilities.sequences);
        Ok(slots.min(USUAL_SEQUENCES + 1))
    }

    fn reserve(&mut self, sequences: usize) -> Result<()> {
        if sequences <= self.capabilities.sequences {
            return Ok(());
        }
        let taken = self.slots.taken();
        if taken > 0 {
            let most = self.capabilities.sequences;
            let range = format!("at most {most} until the {taken} under way have ended");
            return Err(Error::setting("sequences", sequences, range));
        }
        self.device.reserve(sequences)?;
        self.slots.grow(sequences);
        self.capabilities.sequences = sequences;
        Ok(())
    }

    fn open(&mut self, kv_fill: KvFill) -> Result<Sequence> {
        self.slots.open(self.num_layers(), self.capacity, kv_fill)
    }

    fn copy(&mut self, from: &Sequence, length: usize, to: &mut Sequence) -> Result<bool> {
        self.device.copy(from.slot(), length, to.slot())?;
        to.begin_as(from, length)?;
        Ok(true)
    }

    fn step(
        &mut self,
        steps: &mut [SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>> {
        for step in steps.iter() {
            step.sequence.kv().check_room(step.tokens.len())?;
        }
        let layers = self.num_layers();
        let lanes = steps.iter_mut();
        let lanes = lanes.map(|step| Lane::new(step, layers, self.limit(step.max_depth)));
        let mut lanes = lanes.collect::<Result<Vec<_>>>()?;
        let is_crowded = lanes.iter().map(|lane| lane.rows.len()).sum::<usize>() > MAX_ROWS;
        for (lane, step) in lanes.iter_mut().zip(steps.iter()) {
            let rule = step.rule.map(|rule| self.decides_in_batches(rule));
            lane.divide(layers, is_crowded, rule);
        }
        if let Err(error) = self.run(&mut lanes, steps, interrupt) {
            if matches!(error, Error::NotFinite { .. }) {
                // even zero times NaN, of an entry that is masked out, is NaN
                for step in steps.iter() {
                    self.device.clear(step.sequence.slot())?;
                }
            }
            return Err(error);
        }
        let outcomes = lanes.into_iter().zip(steps).map(|(lane, step)| {
            profile::record_step(&lane.timings, step.tokens.len(), lane.exit);
            StepOutcome {
                exit: lane.exit,
                exits_ahead: lane.exits_ahead,
                exit_signals: lane.exit_signals,
                logits: lane.logits,
                margins: lane.margins,
                mispredicted: lane.mispredicted,
            }
        });
        Ok(outcomes.collect())
    }

    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        (self.device.draft_rows() > 0).then_some(self as &mut dyn DraftEngine)
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }

    fn costs_mut(&mut self) -> &mut Costs {
        &mut self.costs
    }
}
