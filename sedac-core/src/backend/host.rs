//! The step of a backend whose host decides after each engine.

use std::ops::Range;

use super::{Backend, Engines, Step};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::kv::KvState;
use crate::policy::{ExitReason, Policy, Signals};

/// Longer passes run in pieces: activations stay small, and an interrupt is noticed soon.
const PREFILL_CHUNK: usize = 256;

/// Drives [`Engines`] one by one and asks the policy after each.
#[derive(Debug)]
pub struct HostDecided<E> {
    engines: E,
    layers: Vec<Range<usize>>,
    exit_allowed: Vec<bool>,
    kv: KvState,
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
            layers,
            engines,
        }
    }

    /// The bookkeeping of the sequence so far.
    pub fn kv(&self) -> &KvState {
        &self.kv
    }

    /// Run one engine over the pass at `positions`, its caches filled up to there first.
    fn run(&mut self, engine: usize, positions: &Range<usize>) -> Result<()> {
        for layer in self.layers[engine].clone() {
            self.fill(layer, positions.start)?;
        }
        self.engines.run(engine)?;
        for layer in self.layers[engine].clone() {
            self.kv.fill(layer, positions.end);
        }
        Ok(())
    }

    fn fill(&mut self, layer: usize, end: usize) -> Result<()> {
        let pending = self.kv.pending(layer, end);
        for start in pending.step_by(PREFILL_CHUNK) {
            let piece = start..end.min(start + PREFILL_CHUNK);
            self.kv.fill(layer, piece.end);
            self.engines.fill(layer, piece)?;
        }
        Ok(())
    }

    /// Ask the policy about every layer of `engine`; what it says of the last one counts.
    fn observe(&self, engine: usize, policy: &mut dyn Policy) -> Option<ExitReason> {
        let depths = self.layers[engine].clone().map(|layer| layer + 1);
        depths
            .zip(self.engines.stability(engine))
            .map(|(depth, &stability)| policy.observe(depth, Signals { stability }))
            .last()
            .flatten()
    }
}

impl<E: Engines> Backend for HostDecided<E> {
    fn num_layers(&self) -> usize {
        self.exit_allowed.len() - 1
    }

    fn room(&self) -> usize {
        self.kv.room()
    }

    fn reset(&mut self) {
        self.kv.truncate(0);
    }

    fn prefill(&mut self, tokens: &[u32], interrupt: &Interrupt) -> Result<()> {
        self.kv.check_room(tokens.len())?;
        for chunk in tokens.chunks(PREFILL_CHUNK) {
            let positions = self.kv.begin(chunk.len())?;
            self.engines.embed(chunk, positions.start)?;
            for engine in 0..self.layers.len() {
                interrupt.check()?;
                self.run(engine, &positions)?;
            }
        }
        self.engines.head(1)
    }

    fn decode(
        &mut self,
        token: u32,
        policy: &mut dyn Policy,
        interrupt: &Interrupt,
    ) -> Result<Step> {
        let positions = self.kv.begin(1)?;
        let full_depth = self.num_layers();
        policy.begin();
        self.engines.embed(&[token], positions.start)?;
        let mut step = Step {
            exit_layer: full_depth,
            reason: ExitReason::FullDepth,
        };
        for engine in 0..self.layers.len() {
            interrupt.check()?;
            self.run(engine, &positions)?;
            let depth = self.layers[engine].end;
            let decision = self.observe(engine, policy);
            if let Some(reason) = decision
                && depth < full_depth
                && self.exit_allowed[depth]
            {
                self.engines.keep(positions.start);
                step = Step {
                    exit_layer: depth,
                    reason,
                };
                break;
            }
        }
        self.engines.head(1)?;
        Ok(step)
    }

    fn verify(&mut self, tokens: &[u32], depth: usize, interrupt: &Interrupt) -> Result<()> {
        let resumed = self.layers.iter().position(|layers| layers.start == depth);
        let resumed = resumed.expect("drafts exit where an engine ends");
        let positions = if depth == 0 {
            let positions = self.kv.begin(tokens.len())?;
            self.engines.embed(tokens, positions.start)?;
            positions
        } else {
            let start = self.kv.length() - tokens.len();
            self.engines.resume(tokens, start, resumed)?;
            start..self.kv.length()
        };
        for engine in resumed..self.layers.len() {
            interrupt.check()?;
            self.run(engine, &positions)?;
        }
        self.engines.head(tokens.len())
    }

    fn truncate(&mut self, length: usize) {
        self.kv.truncate(length);
    }

    fn logits(&self) -> &[f32] {
        self.engines.logits()
    }

    fn complete(&mut self, interrupt: &Interrupt) -> Result<()> {
        for layer in 0..self.num_layers() {
            interrupt.check()?;
            self.fill(layer, self.kv.length())?;
        }
        Ok(())
    }
}
