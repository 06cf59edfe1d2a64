//! The step of a backend whose host decides after each engine.

use std::ops::Range;
use std::time::Instant;

use super::not_finite::{all_finite, origin};
use super::{Backend, Costs, Engines, Step};
use crate::error::{Error, Result};
use crate::exit_config::KvFill;
use crate::interrupt::Interrupt;
use crate::kv::KvState;
use crate::policy::{ExitReason, Policy, Signals};

/// Drives [`Engines`] one by one and asks the policy after each.
#[derive(Debug)]
pub struct HostDecided<E> {
    engines: E,
    layers: Vec<Range<usize>>,
    exit_allowed: Vec<bool>,
    kv: KvState,
    /// Of the sequence, one a position.
    tokens: Vec<u32>,
    kv_fill: KvFill,
    costs: Costs,
    /// Stability of the newest token's last three layers.
    recent: [f32; 3],
}

impl<E: Engines> HostDecided<E> {
    /// Drive `engines`, with exits allowed after the depths `exit_layers` and caches of `capacity`
    /// positions.
    pub fn new(engines: E, exit_layers: &[usize], capacity: usize) -> Self {
        let layers = engines.layers();
        let count = layers.last().map_or(0, |range| range.end);
        Self {
            exit_allowed: (0..=count)
                .map(|depth| exit_layers.contains(&depth))
                .collect(),
            kv: KvState::new(count, capacity),
            tokens: Vec::new(),
            kv_fill: KvFill::default(),
            costs: Costs::default(),
            recent: [0.0; 3],
            layers,
            engines,
        }
    }

    /// The bookkeeping of the sequence so far.
    pub fn kv(&self) -> &KvState {
        &self.kv
    }

    /// Start a pass over `tokens` at the sequence's next positions.
    fn begin(&mut self, tokens: &[u32]) -> Result<Range<usize>> {
        let positions = self.kv.begin(tokens.len())?;
        self.tokens.extend(tokens);
        if !tokens.is_empty() {
            self.engines.embed(tokens, positions.start)?;
        }
        Ok(positions)
    }

    /// Take the pass at `positions`, and those that wait for it, through all engines.
    fn run_all(&mut self, mut positions: Range<usize>, interrupt: &Interrupt) -> Result<()> {
        for engine in 0..self.layers.len() {
            interrupt.check()?;
            self.catch_up(engine, &mut positions)?;
            if !positions.is_empty() {
                self.run(engine, &positions)?;
            }
        }
        Ok(())
    }

    /// Give the caches of `engine` what they lack below the pass at `positions`. Deferred
    /// positions join the pass, as many as it may hold: the newest, whose logits may be asked for.
    /// Those before run `engine` on their own.
    fn catch_up(&mut self, engine: usize, positions: &mut Range<usize>) -> Result<()> {
        let layers = self.layers[engine].clone();
        if self.kv_fill == KvFill::Propagate {
            return layers
                .into_iter()
                .try_for_each(|layer| self.fill(layer, positions.start));
        }
        let mut waiting = self.kv.pending(layers.start, positions.start);
        if waiting.is_empty() {
            return Ok(());
        }
        self.engines.keep(positions.clone())?;
        let most = self.engines.most_tokens();
        while positions.end - waiting.start > most {
            let piece = waiting.start..(positions.end - most).min(waiting.start + most);
            self.engines.resume(piece.clone(), engine)?;
            self.run(engine, &piece)?;
            self.engines.keep(piece.clone())?;
            waiting.start = piece.end;
        }
        positions.start = waiting.start;
        self.engines.resume(positions.clone(), engine)
    }

    fn run(&mut self, engine: usize, positions: &Range<usize>) -> Result<()> {
        let layers = self.layers[engine].clone();
        let started = Instant::now();
        self.engines.run(engine)?;
        self.costs
            .note_layers(layers.len(), positions.len(), started.elapsed());
        self.note_run(engine, positions);
        Ok(())
    }

    fn note_run(&mut self, engine: usize, positions: &Range<usize>) {
        for layer in self.layers[engine].clone() {
            self.kv.fill(layer, positions.end);
        }
    }

    /// The logits of the newest `tokens` positions, which ran `depth` layers.
    fn head(&mut self, tokens: usize, depth: usize, interrupt: &Interrupt) -> Result<()> {
        let started = Instant::now();
        self.engines.head(tokens)?;
        self.costs.note_head(tokens, started.elapsed());
        let logits = self.engines.logits();
        if all_finite(logits) {
            return Ok(());
        }
        let rows = logits.chunks_exact(logits.len() / tokens);
        let finite = rows.take_while(|row| all_finite(row)).count();
        let engine = self.origin(tokens, depth, interrupt)?;
        self.engines.clear()?;
        Err(Error::NotFinite {
            position: self.kv.length() - tokens + finite,
            engine,
        })
    }

    /// The engine that the logits of the newest `tokens` positions, not all finite, come from, if
    /// it shows. The sequence is lost.
    fn origin(
        &mut self,
        tokens: usize,
        depth: usize,
        interrupt: &Interrupt,
    ) -> Result<Option<String>> {
        if !all_finite(&self.engines.residual(tokens)?) {
            return origin(&mut self.engines, &self.tokens, interrupt);
        }
        Ok(Some(if depth == self.num_layers() {
            "the head engine".into()
        } else {
            format!("the head engine, or the lens of depth {depth},")
        }))
    }

    fn fill(&mut self, layer: usize, end: usize) -> Result<()> {
        let pending = self.kv.pending(layer, end);
        let most = self.engines.most_tokens();
        for start in pending.step_by(most) {
            let piece = start..end.min(start + most);
            self.kv.fill(layer, piece.end);
            self.engines.fill(layer, piece)?;
        }
        Ok(())
    }

    /// Ask the policy about every layer of `engine`; what it says of the last one counts, if a
    /// token may exit there.
    fn observe(&mut self, engine: usize, policy: &mut dyn Policy) -> Result<Option<ExitReason>> {
        let end = self.layers[engine].end;
        let exit_allowed = self.exit_allowed[end] && end < self.num_layers();
        let mut decision = None;
        for (index, depth) in (self.layers[engine].start + 1..=end).enumerate() {
            let stability = self.engines.stability(engine)[index];
            self.recent = [self.recent[1], self.recent[2], stability];
            let mut signals = Signals {
                stability,
                ..Signals::default()
            };
            if depth == end && exit_allowed {
                signals.risk = self.engines.risk(engine);
                if policy.reads_exit(depth) {
                    signals.exit = self.engines.exit_signals(depth, self.recent)?;
                }
            }
            decision = policy.observe(depth, signals);
        }
        Ok(decision.filter(|_| exit_allowed))
    }

    /// Take the pass through the engines from `engine` on, the last ones, `skipped_share` of the
    /// remaining layers, without their MLPs.
    fn run_softly(
        &mut self,
        engine: usize,
        positions: &mut Range<usize>,
        skipped_share: f32,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let layers = self.num_layers();
        let remaining = layers - self.layers[engine].start;
        let skipped = (skipped_share * remaining as f32).round() as usize;
        for engine in engine..self.layers.len() {
            interrupt.check()?;
            self.catch_up(engine, positions)?;
            if self.layers[engine].start + skipped < layers {
                self.run(engine, positions)?;
            } else {
                self.engines.run_attention(engine)?;
                self.note_run(engine, positions);
            }
        }
        Ok(())
    }
}

impl<E: Engines> Backend for HostDecided<E> {
    fn num_layers(&self) -> usize {
        self.exit_allowed.len() - 1
    }

    fn room(&self) -> usize {
        self.kv.room()
    }

    fn reset(&mut self, kv_fill: KvFill) {
        self.truncate(0);
        self.kv_fill = kv_fill;
    }

    fn prefill(&mut self, tokens: &[u32], interrupt: &Interrupt) -> Result<()> {
        self.kv.check_room(tokens.len())?;
        for chunk in tokens.chunks(self.engines.most_tokens()) {
            let positions = self.begin(chunk)?;
            self.run_all(positions, interrupt)?;
        }
        self.head(1, self.num_layers(), interrupt)
    }

    fn decode(
        &mut self,
        token: u32,
        policy: &mut dyn Policy,
        interrupt: &Interrupt,
    ) -> Result<Step> {
        let mut positions = self.begin(&[token])?;
        let full_depth = self.num_layers();
        policy.begin();
        self.recent = [0.0; 3];
        let mut step = Step {
            exit_layer: full_depth,
            reason: ExitReason::FullDepth,
        };
        for engine in 0..self.layers.len() {
            interrupt.check()?;
            self.catch_up(engine, &mut positions)?;
            self.run(engine, &positions)?;
            let Some(reason) = self.observe(engine, policy)? else {
                continue;
            };
            step = Step {
                exit_layer: self.layers[engine].end,
                reason,
            };
            if let Some(share) = policy.skipped_share() {
                self.run_softly(engine + 1, &mut positions, share, interrupt)?;
            } else {
                self.engines.keep(positions)?;
            }
            break;
        }
        let rows = match step.reason {
            ExitReason::FullDepth => policy.rows(),
            _ => 1,
        };
        self.head(rows, step.exit_layer, interrupt)?;
        Ok(step)
    }

    fn verify(&mut self, new: &[u32], rows: usize, interrupt: &Interrupt) -> Result<()> {
        let positions = self.begin(new)?;
        self.run_all(positions, interrupt)?;
        self.head(rows, self.num_layers(), interrupt)
    }

    fn truncate(&mut self, length: usize) {
        self.kv.truncate(length);
        self.tokens.truncate(length);
    }

    fn logits(&self) -> &[f32] {
        self.engines.logits()
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }

    fn complete(&mut self, interrupt: &Interrupt) -> Result<()> {
        let end = self.kv.length();
        self.run_all(end..end, interrupt)
    }
}
