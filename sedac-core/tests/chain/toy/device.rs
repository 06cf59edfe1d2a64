//! A toy device: it runs up to three sequences at once, and of an exit rule it sees the table only.

use std::sync::{Arc, Mutex};

use sedac_core::backend::{
    Backend, Capabilities, Costs, Logits, LogitsRequest, SequenceStep, StepExit, StepOutcome,
};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::{Condition, ExitReason, ExitSignals, Signal};
use sedac_core::sampler::argmax;
use sedac_core::sequence::{Sequence, Slots};
use sedac_core::{Error, Result};

use super::choices::State;
use super::{CAPACITY, Cache, Caches, Hidden, ends};

const SEQUENCES: usize = 3;

/// The toy model on a device that decides about exits itself.
pub(crate) struct ToyDevice {
    exit_layers: Vec<usize>,
    num_layers: usize,
    agreement: u64,
    caches: Vec<Caches>,
    saved: Vec<Vec<Hidden>>,
    slots: Slots,
    capabilities: Capabilities,
    costs: Costs,
}

/// The table of one reason to stop, as it lies in a device's memory, and what is remembered.
struct Table {
    reason: ExitReason,
    rows: Vec<Condition>,
    state: State,
}

/// One sequence of a pass.
struct Lane {
    slot: usize,
    start: usize,
    rows: Vec<Hidden>,
    tables: Vec<Table>,
    exit_signals: Option<ExitSignals>,
    exit: Option<StepExit>,
}

impl ToyDevice {
    /// A device whose first slot's cache is `first`.
    pub(crate) fn new(engine_sizes: &[usize], agreement: u64, first: &Caches) -> Self {
        let exit_layers = ends(engine_sizes);
        let num_layers = *exit_layers.last().unwrap();
        let empty: Cache = vec![vec![None; CAPACITY]; num_layers];
        *first.lock().unwrap() = empty.clone();
        let mut caches = vec![first.clone()];
        caches.resize_with(SEQUENCES, || Arc::new(Mutex::new(empty.clone())));
        Self {
            capabilities: Capabilities {
                sequences: SEQUENCES,
                shares_passes: true,
                shares_drafts: true,
                probes: exit_layers.clone(),
                exit_heads: exit_layers.clone(),
                attention_only: false,
                margins: false,
                trained_drafter: false,
                drafts_at_once: 1,
                verifies_exactly: true,
                ahead: 1,
                prefill_chunk: 9,
            },
            exit_layers,
            num_layers,
            agreement,
            caches,
            saved: vec![vec![Hidden::default(); CAPACITY]; SEQUENCES],
            slots: Slots::new(SEQUENCES),
            costs: Costs::default(),
        }
    }

    /// The cache of `slot`.
    pub(crate) fn cache(&self, slot: usize) -> Cache {
        self.caches[slot].lock().unwrap().clone()
    }

    fn begin(&self, step: &mut SequenceStep<'_>) -> Result<Lane> {
        let positions = step.sequence.append(step.tokens)?;
        let criteria = step.rule.map_or(&[][..], |rule| rule.criteria());
        let tables = criteria.iter().map(|criterion| Table {
            reason: criterion.reason,
            rows: criterion.conditions.clone(),
            state: State::default(),
        });
        Ok(Lane {
            slot: step.sequence.slot(),
            start: positions.start,
            rows: step.tokens.iter().copied().map(Hidden::of).collect(),
            tables: tables.collect(),
            exit_signals: None,
            exit: None,
        })
    }

    /// Take `lane` through `layer`, with the positions that wait there.
    fn run_layer(&mut self, layer: usize, lane: &mut Lane, step: &mut SequenceStep<'_>) {
        let waiting = step.sequence.kv().pending(layer, lane.start);
        let mut rows = self.saved[lane.slot][waiting.clone()].to_vec();
        rows.append(&mut lane.rows);
        (lane.rows, lane.start) = (rows, waiting.start);
        if lane.rows.is_empty() {
            return;
        }
        let mut cache = self.caches[lane.slot].lock().unwrap();
        for (row, position) in lane.rows.iter_mut().zip(lane.start..) {
            row.run(layer, position, &mut cache);
        }
        drop(cache);
        let end = lane.start + lane.rows.len();
        step.sequence.kv_mut().fill(layer, end);
        self.decide(layer + 1, lane, step);
    }

    fn decide(&mut self, depth: usize, lane: &mut Lane, step: &SequenceStep<'_>) {
        let newest = *lane.rows.last().unwrap();
        let mut reason = None;
        lane.exit_signals = None;
        for table in &mut lane.tables {
            let row = table.rows[depth - 1];
            if matches!(row.signal, Signal::Margin | Signal::Learned) {
                lane.exit_signals = Some(newest.exit_signals(depth));
            }
            if table.state.stops(row, newest, depth) && reason.is_none() {
                reason = Some(table.reason);
            }
        }
        let limited = depth >= step.max_depth;
        let reason = reason.or(limited.then_some(ExitReason::DepthLimit));
        if depth == self.num_layers || !self.exit_layers.contains(&depth) {
            return;
        }
        if let Some(reason) = reason {
            let layer = depth;
            lane.exit = Some(StepExit { layer, reason });
            self.saved[lane.slot][lane.start..][..lane.rows.len()].copy_from_slice(&lane.rows);
        }
    }

    fn outcome(&self, lane: Lane, wanted: &LogitsRequest) -> StepOutcome {
        let exit = lane.exit.unwrap_or(StepExit {
            layer: self.num_layers,
            reason: ExitReason::FullDepth,
        });
        let is_full = exit.reason == ExitReason::FullDepth;
        let positions = wanted.positions();
        let positions = if is_full { positions } else { positions.min(1) };
        let newest = &lane.rows[lane.rows.len() - positions..];
        let rows: Vec<_> = newest
            .iter()
            .map(|row| row.logits(exit.layer, self.num_layers, self.agreement))
            .collect();
        let logits = match wanted {
            LogitsRequest::None => Logits::None,
            LogitsRequest::Rows(_) => Logits::Rows(rows.concat()),
            LogitsRequest::Tokens(_) => {
                Logits::Tokens(rows.iter().map(|row| argmax(row)).collect())
            }
            LogitsRequest::Sampled(race) => {
                let later = (0..positions).rev();
                let token = |(later, row): (_, &Vec<f32>)| race.choose(later, row);
                Logits::Tokens(later.zip(&rows).map(token).collect())
            }
        };
        StepOutcome {
            exit,
            exits_ahead: Vec::new(),
            exit_signals: lane.exit_signals,
            logits,
            margins: Vec::new(),
            mispredicted: false,
        }
    }
}

impl Backend for ToyDevice {
    fn num_layers(&self) -> usize {
        self.num_layers
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn open(&mut self, kv_fill: KvFill) -> Result<Sequence> {
        let slot = self.slots.take().ok_or(Error::Cancelled)?;
        Ok(Sequence::new(slot, self.num_layers, CAPACITY, kv_fill))
    }

    /// All sequences go through each layer together.
    fn step(
        &mut self,
        steps: &mut [SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>> {
        interrupt.check()?;
        for step in steps.iter() {
            step.sequence.kv().check_room(step.tokens.len())?;
        }
        let lanes = steps.iter_mut().map(|step| self.begin(step));
        let mut lanes = lanes.collect::<Result<Vec<_>>>()?;
        for layer in 0..self.num_layers {
            for (lane, step) in lanes.iter_mut().zip(steps.iter_mut()) {
                if lane.exit.is_none() {
                    self.run_layer(layer, lane, step);
                }
            }
        }
        let outcomes = lanes.into_iter().zip(steps);
        Ok(outcomes
            .map(|(lane, step)| self.outcome(lane, &step.logits))
            .collect())
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }

    fn costs_mut(&mut self) -> &mut Costs {
        &mut self.costs
    }
}
