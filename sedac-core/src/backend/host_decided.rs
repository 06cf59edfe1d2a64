//! The step of a backend whose host decides after each engine.

use std::ops::Range;

use tracing::trace;

use super::not_finite::{all_finite, origin};
use super::profile;
use super::{
    Backend, Capabilities, Costs, DraftEngine, EnginePart, Engines, Logits, LogitsRequest,
    SequenceStep, StepExit, StepOutcome,
};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::kv::KvFill;
use crate::policy::{Decision, ExitReason, ExitRule, ExitSignals, RuleState, Signal, Signals};
use crate::sequence::{Sequence, Slots};

/// Drives [`Engines`] one by one and interprets the exit rule after each.
#[derive(Debug)]
pub struct HostDecided<E> {
    pub(super) engines: E,
    pub(super) layers: Vec<Range<usize>>,
    exit_allowed: Vec<bool>,
    capabilities: Capabilities,
    capacity: usize,
    slots: Slots,
    costs: Costs,
}

/// What a rule knows of the token that it decides about.
pub(super) struct Deciding<'a> {
    rule: &'a ExitRule,
    state: RuleState,
    /// Stability of the last three layers.
    recent: [f32; 3],
    pub(super) exit_signals: Option<ExitSignals>,
}

impl<'a> Deciding<'a> {
    pub(super) fn new(rule: &'a ExitRule) -> Self {
        Self {
            rule,
            state: rule.start(),
            recent: [0.0; 3],
            exit_signals: None,
        }
    }
}

impl<E: Engines> HostDecided<E> {
    /// Drive `engines`, with exits allowed after the depths `exit_layers` and caches of `capacity`
    /// positions.
    pub fn new(engines: E, exit_layers: &[usize], capacity: usize) -> Self {
        let layers = engines.layers();
        let count = layers.last().map_or(0, |range| range.end);
        let capabilities = engines.capabilities();
        Self {
            exit_allowed: (0..=count)
                .map(|depth| depth < count && exit_layers.contains(&depth))
                .collect(),
            slots: Slots::new(capabilities.sequences),
            costs: Costs::default(),
            capabilities,
            capacity,
            layers,
            engines,
        }
    }

    fn step_one(
        &mut self,
        step: &mut SequenceStep<'_>,
        interrupt: &Interrupt,
    ) -> Result<StepOutcome> {
        self.engines.select(step.sequence.slot());
        let mut tokens = step.tokens;
        while tokens.len() > self.engines.max_tokens() {
            let (piece, rest) = tokens.split_at(self.engines.max_tokens());
            self.run_layers(step.sequence, piece, None, step.max_depth, interrupt)?;
            tokens = rest;
        }
        let mut deciding = step.rule.map(Deciding::new);
        let exit = self.run_layers(
            step.sequence,
            tokens,
            deciding.as_mut(),
            step.max_depth,
            interrupt,
        )?;
        let logits = self.logits(step.sequence, &step.logits, exit, interrupt)?;
        self.note_costs(step.tokens.len(), exit);
        Ok(StepOutcome {
            exit,
            exits_ahead: Vec::new(),
            exit_signals: deciding.and_then(|deciding| deciding.exit_signals),
            logits,
            margins: Vec::new(),
            mispredicted: false,
        })
    }

    /// Take a pass over `tokens`, and the positions that wait for it, through the engines up to the
    /// exit.
    fn run_layers(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        mut deciding: Option<&mut Deciding<'_>>,
        max_depth: usize,
        interrupt: &Interrupt,
    ) -> Result<StepExit> {
        let mut positions = sequence.append(tokens)?;
        if !tokens.is_empty() {
            self.engines.embed(tokens, positions.start)?;
        }
        for engine in 0..self.layers.len() {
            interrupt.check()?;
            self.catch_up(engine, sequence, &mut positions)?;
            if positions.is_empty() {
                continue;
            }
            self.run(engine, sequence, &positions)?;
            let layer = self.layers[engine].end;
            let decision = match &mut deciding {
                Some(deciding) => self.decide(engine, None, deciding)?,
                None => None,
            };
            if let Some(Decision {
                reason,
                skipped_mlps: Some(share),
            }) = decision
            {
                self.run_softly(engine + 1, sequence, &mut positions, share, interrupt)?;
                return Ok(StepExit { layer, reason });
            }
            let reason = decision.map(|decision| decision.reason);
            if let Some(exit) = self.exit_after(engine, max_depth, reason) {
                self.engines.save(positions)?;
                return Ok(exit);
            }
        }
        Ok(StepExit {
            layer: self.num_layers(),
            reason: ExitReason::FullDepth,
        })
    }

    /// Give the caches of `engine` what they lack below the pass at `positions`. Deferred
    /// positions join the pass, as many as it may hold: the newest, whose logits may be asked for.
    /// Those before run `engine` in passes before it.
    fn catch_up(
        &mut self,
        engine: usize,
        sequence: &mut Sequence,
        positions: &mut Range<usize>,
    ) -> Result<()> {
        let layers = self.layers[engine].clone();
        if sequence.kv_fill() == KvFill::Propagate {
            return layers
                .into_iter()
                .try_for_each(|layer| self.fill(layer, sequence, positions.start));
        }
        let mut waiting = sequence.kv().pending(layers.start, positions.start);
        if waiting.is_empty() {
            return Ok(());
        }
        if positions.start < positions.end {
            self.engines.save(positions.clone())?;
        }
        let max = self.engines.max_tokens();
        while positions.end - waiting.start > max {
            let piece = waiting.start..(positions.end - max).min(waiting.start + max);
            self.engines.resume(piece.clone(), engine)?;
            self.run(engine, sequence, &piece)?;
            self.engines.save(piece.clone())?;
            waiting.start = piece.end;
        }
        positions.start = waiting.start;
        self.engines.resume(positions.clone(), engine)
    }

    fn run(
        &mut self,
        engine: usize,
        sequence: &mut Sequence,
        positions: &Range<usize>,
    ) -> Result<()> {
        self.engines.run(engine)?;
        self.note_run(engine, sequence, positions);
        Ok(())
    }

    pub(super) fn note_run(
        &self,
        engine: usize,
        sequence: &mut Sequence,
        positions: &Range<usize>,
    ) {
        for layer in self.layers[engine].clone() {
            sequence.kv_mut().fill(layer, positions.end);
        }
    }

    pub(super) fn fill(&mut self, layer: usize, sequence: &mut Sequence, end: usize) -> Result<()> {
        let pending = sequence.kv().pending(layer, end);
        let max = self.engines.max_tokens();
        for start in pending.step_by(max) {
            let piece = start..end.min(start + max);
            sequence.kv_mut().fill(layer, piece.end);
            self.engines.fill(layer, piece)?;
        }
        Ok(())
    }

    /// The exit after `engine`, by `reason` if there is one, or since `max_depth` is reached.
    pub(super) fn exit_after(
        &self,
        engine: usize,
        max_depth: usize,
        reason: Option<ExitReason>,
    ) -> Option<StepExit> {
        let layer = self.layers[engine].end;
        let is_limited = layer >= max_depth && self.exit_allowed[layer];
        let reason = reason.or(is_limited.then_some(ExitReason::DepthLimit))?;
        Some(StepExit { layer, reason })
    }

    /// Interpret the rule after every layer of `engine`, for the newest row of the sequence
    /// `row` of a shared pass, or for the newest token; what it says of the last layer counts, if a token
    /// may exit there.
    pub(super) fn decide(
        &mut self,
        engine: usize,
        row: Option<usize>,
        deciding: &mut Deciding<'_>,
    ) -> Result<Option<Decision>> {
        let layers = self.layers[engine].clone();
        let exit_allowed = self.exit_allowed[layers.end];
        let mut decision = None;
        let stability = match row {
            Some(row) => self.row_engines().row_stability(engine, row),
            None => self.engines.stability(engine)?,
        };
        for (stability, depth) in stability.into_iter().zip(layers.start + 1..) {
            deciding.recent = [deciding.recent[1], deciding.recent[2], stability];
            let mut signals = Signals {
                stability,
                ..Signals::default()
            };
            if depth == layers.end && exit_allowed {
                if deciding
                    .rule
                    .signals(depth)
                    .any(|signal| signal == Signal::Risk)
                {
                    signals.risk = match row {
                        Some(row) => self.row_engines().row_risk(engine, row),
                        None => self.engines.risk(engine),
                    };
                }
                if deciding.rule.reads_exit_head(depth) {
                    let recent = deciding.recent;
                    signals.exit = match row {
                        Some(row) => self.row_engines().row_exit_signals(depth, row, recent)?,
                        None => self.engines.exit_signals(depth, recent)?,
                    };
                }
            }
            deciding.exit_signals = signals.exit;
            decision = deciding.state.observe(deciding.rule, depth, &signals);
            trace!(depth, exit_allowed, ?signals, ?decision, "exit rule");
        }
        Ok(decision.filter(|_| exit_allowed))
    }

    /// Take the pass through the engines from `engine` on, the last ones, `skipped_mlps` of the
    /// remaining layers, without their MLPs.
    fn run_softly(
        &mut self,
        engine: usize,
        sequence: &mut Sequence,
        positions: &mut Range<usize>,
        skipped_mlps: f32,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let layers = self.num_layers();
        let remaining = layers - self.layers[engine].start;
        let skipped = (skipped_mlps * remaining as f32).round() as usize;
        for engine in engine..self.layers.len() {
            interrupt.check()?;
            self.catch_up(engine, sequence, positions)?;
            let with_mlp = self.layers[engine].start + skipped < layers;
            match self.engines.attention_only() {
                Some(attention) if !with_mlp => {
                    attention.run_attention(engine)?;
                    self.note_run(engine, sequence, positions);
                }
                _ => self.run(engine, sequence, positions)?,
            }
        }
        Ok(())
    }

    /// The logits `wanted` after `exit`.
    fn logits(
        &mut self,
        sequence: &Sequence,
        wanted: &LogitsRequest,
        exit: StepExit,
        interrupt: &Interrupt,
    ) -> Result<Logits> {
        let positions = match exit.reason {
            ExitReason::FullDepth => wanted.positions(),
            _ => wanted.positions().min(1),
        };
        if positions == 0 {
            return Ok(Logits::None);
        }
        self.engines.head(positions)?;
        let logits = self.engines.logits();
        let width = logits.len() / positions;
        if all_finite(logits) {
            return Ok(wanted.of_rows(logits, width));
        }
        let finite = logits.chunks_exact(width).take_while(|row| all_finite(row));
        let position = sequence.kv().length() - positions + finite.count();
        let engine = self.origin(sequence, positions, exit.layer, interrupt)?;
        self.engines.clear()?;
        Err(Error::NotFinite { position, engine })
    }

    /// The engine that the logits of the newest `rows` positions, not all finite, come from, if it
    /// can be found.
    fn origin(
        &mut self,
        sequence: &Sequence,
        rows: usize,
        depth: usize,
        interrupt: &Interrupt,
    ) -> Result<Option<String>> {
        if !all_finite(&self.engines.residual(rows)?) {
            return origin(&mut self.engines, sequence.tokens(), interrupt);
        }
        Ok(Some(if depth == self.num_layers() {
            "the head engine".into()
        } else {
            format!("the head engine, or the lens of depth {depth},")
        }))
    }

    /// Note what the step cost that took `tokens` tokens to `exit`.
    pub(super) fn note_costs(&mut self, tokens: usize, exit: StepExit) {
        let timings = self.engines.take_timings();
        profile::record_step(&timings, tokens, exit);
        for timing in timings {
            match timing.part {
                EnginePart::Layers(layers) => {
                    self.costs
                        .note_layers(layers.len(), timing.tokens, timing.elapsed);
                }
                EnginePart::Head => self.costs.note_head(timing.tokens, timing.elapsed),
                _ => {}
            }
        }
    }
}

impl<E: Engines> Backend for HostDecided<E> {
    fn num_layers(&self) -> usize {
        self.exit_allowed.len() - 1
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn reserve(&mut self, sequences: usize) -> Result<()> {
        if sequences > self.capabilities.sequences {
            self.capabilities.sequences = self.engines.reserve(sequences)?;
            self.slots.grow(self.capabilities.sequences);
            let has_rows = self.engines.rows().is_some();
            self.capabilities.shares_passes = has_rows;
            self.capabilities.shares_drafts = has_rows;
        }
        Ok(())
    }

    fn open(&mut self, kv_fill: KvFill) -> Result<Sequence> {
        self.slots.open(self.num_layers(), self.capacity, kv_fill)
    }

    fn copy(&mut self, from: &Sequence, length: usize, to: &mut Sequence) -> Result<bool> {
        let copied = self.engines.copy(from.slot(), length, to.slot());
        if copied {
            to.begin_as(from, length)?;
        }
        Ok(copied)
    }

    fn step(
        &mut self,
        steps: &mut [SequenceStep<'_>],
        interrupt: &Interrupt,
    ) -> Result<Vec<StepOutcome>> {
        for step in steps.iter() {
            step.sequence.kv().check_room(step.tokens.len())?;
        }
        let mut outcomes: Vec<_> = steps.iter().map(|_| None).collect();
        let shared = self.shared_pass(steps);
        if !shared.is_empty() {
            let rows = steps.iter_mut().enumerate();
            let rows = rows.filter(|(index, _)| shared.contains(index));
            let mut rows: Vec<_> = rows.map(|(_, step)| step).collect();
            let shared = shared
                .into_iter()
                .zip(self.step_rows(&mut rows, interrupt)?);
            shared.for_each(|(index, outcome)| outcomes[index] = Some(outcome));
        }
        let all = outcomes.into_iter().zip(steps);
        all.map(|(outcome, step)| outcome.map_or_else(|| self.step_one(step, interrupt), Ok))
            .collect()
    }

    fn draft_engine(&mut self) -> Option<&mut dyn DraftEngine> {
        self.engines.draft_engine()
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }

    fn costs_mut(&mut self) -> &mut Costs {
        &mut self.costs
    }
}
