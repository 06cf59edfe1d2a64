//! Any sequence of prompts, exits and fills leaves each layer with exactly one entry per position.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::Range;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sedac_core::Result;
use sedac_core::backend::{
    Ahead, Backend, Capabilities, EngineTiming, Engines, HostDecided, LogitsRequest, SequenceStep,
    StepExit,
};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::{KvFill, KvState};
use sedac_core::policy::{ExitReason, ExitSignals};
use sedac_core::sequence::Sequence;

const CAPACITY: usize = 600;

/// Where a cache entry came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Run,
    Fill { exit_layer: usize },
}

/// Caches by layer and position, shared with the test.
type Caches = Arc<Mutex<Vec<Vec<Option<Source>>>>>;

/// Engines that compute nothing and complain about every wrong access.
struct Recorder {
    layers: Vec<Range<usize>>,
    max_tokens: usize,
    caches: Caches,
    saved: Vec<Option<usize>>,
    pass: Range<usize>,
    depth: usize,
}

impl Recorder {
    fn new(engine_sizes: &[usize], max_tokens: usize, caches: Caches) -> Self {
        let mut layers = Vec::new();
        let mut next = 0;
        for &size in engine_sizes {
            layers.push(next..next + size);
            next += size;
        }
        *caches.lock().unwrap() = vec![vec![None; CAPACITY]; next];
        Self {
            layers,
            max_tokens,
            caches,
            saved: vec![None; CAPACITY],
            pass: 0..0,
            depth: 0,
        }
    }

    fn write(&self, layer: usize, position: usize, source: Source) {
        let slot = &mut self.caches.lock().unwrap()[layer][position];
        assert_eq!(
            *slot, None,
            "layer {layer} position {position} written twice"
        );
        *slot = Some(source);
    }
}

impl Engines for Recorder {
    fn layers(&self) -> Vec<Range<usize>> {
        self.layers.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        self.pass = start..start + tokens.len();
        self.depth = 0;
        // what lay beyond was rolled back
        for cache in self.caches.lock().unwrap().iter_mut() {
            cache[start..].fill(None);
        }
        self.saved[start..].fill(None);
        Ok(())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        assert!(self.pass.len() <= self.max_tokens, "a pass too long");
        for layer in self.layers[engine].clone() {
            assert_eq!(layer, self.depth, "engines run in order");
            for position in 0..self.pass.start {
                let entry = self.caches.lock().unwrap()[layer][position];
                assert!(
                    entry.is_some(),
                    "layer {layer} attends to a hole at {position}"
                );
            }
            for position in self.pass.clone() {
                self.write(layer, position, Source::Run);
            }
            self.depth += 1;
        }
        Ok(())
    }

    fn residual(&mut self, _: usize) -> Result<Vec<f32>> {
        unreachable!("there are no logits that could be wrong")
    }

    fn risk(&self, _: usize) -> Option<f32> {
        None
    }

    fn exit_signals(&mut self, _: usize, _: [f32; 3]) -> Result<Option<ExitSignals>> {
        Ok(None)
    }

    fn stability(&mut self, _: usize) -> Result<Vec<f32>> {
        unreachable!("no rule decides")
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.depth = self.layers[engine].start;
        for position in positions.clone() {
            let depth = self.saved[position].expect("resumed from a saved hidden state");
            assert_eq!(depth, self.depth, "position {position} waits elsewhere");
        }
        self.pass = positions;
        Ok(())
    }

    fn save(&mut self, positions: Range<usize>) -> Result<()> {
        assert_eq!(positions, self.pass, "the whole pass is saved");
        for position in positions {
            self.saved[position] = Some(self.depth);
        }
        Ok(())
    }

    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()> {
        assert!((1..=self.max_tokens).contains(&positions.len()));
        for position in positions {
            let exit_layer = self.saved[position].expect("filled from a saved hidden state");
            assert!(exit_layer <= layer, "a layer that ran is filled");
            self.write(layer, position, Source::Fill { exit_layer });
        }
        Ok(())
    }

    fn head(&mut self, tokens: usize) -> Result<()> {
        assert!(
            tokens <= self.pass.len(),
            "logits of tokens outside the pass"
        );
        Ok(())
    }

    fn logits(&self) -> &[f32] {
        &[]
    }

    fn take_timings(&mut self) -> Vec<EngineTiming> {
        Vec::new()
    }
}

#[derive(Debug, Clone)]
enum Event {
    Prompt(usize),
    Decode(usize),
    Verify(usize),
    Truncate(usize),
    Complete,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        1 => (1..300_usize).prop_map(Event::Prompt),
        8 => (1..=12_usize).prop_map(Event::Decode),
        2 => (0..6_usize).prop_map(Event::Verify),
        2 => (0..6_usize).prop_map(Event::Truncate),
        1 => Just(Event::Complete),
    ];
    prop::collection::vec(event, 1..40)
}

fn engine_sizes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1..=3_usize, 1..6)
}

/// The depth that a token limited to `wanted` layers exits at, and why.
fn expected_exit(sizes: &[usize], allowed: &[usize], wanted: usize) -> (usize, ExitReason) {
    let total: usize = sizes.iter().sum();
    let mut end = 0;
    for size in sizes {
        end += size;
        if end >= wanted && end < total && allowed.contains(&end) {
            return (end, ExitReason::DepthLimit);
        }
    }
    (total, ExitReason::FullDepth)
}

/// One step; the recorder has no logits, but complains where one is not in the pass.
fn step(
    backend: &mut HostDecided<Recorder>,
    sequence: &mut Sequence,
    tokens: usize,
    max_depth: usize,
    rows: usize,
) -> Result<StepExit> {
    let step = SequenceStep {
        sequence,
        tokens: &vec![0; tokens],
        rule: None,
        max_depth,
        logits: match rows {
            0 => LogitsRequest::None,
            rows => LogitsRequest::Rows(rows),
        },
        ahead: Ahead::default(),
        next_draft: None,
    };
    let outcomes = backend.step(&mut [step], &Interrupt::default())?;
    Ok(outcomes[0].exit)
}

fn kv_fills() -> impl Strategy<Value = KvFill> {
    prop::sample::select(KvFill::ALL.to_vec())
}

proptest! {
    #[test]
    fn every_layer_holds_one_entry_per_position(
        sizes in engine_sizes(),
        // at least what a verification has
        max_tokens in 5..20_usize,
        forbidden in 1..16_usize,
        kv_fill in kv_fills(),
        events in events(),
    ) {
        let caches = Caches::default();
        let total: usize = sizes.iter().sum();
        let allowed: Vec<usize> = (1..=total).filter(|&depth| depth != forbidden).collect();
        let engines = Recorder::new(&sizes, max_tokens, caches.clone());
        let mut backend = HostDecided::new(engines, &allowed, CAPACITY);
        let mut sequence = backend.open(kv_fill)?;
        // the depth each position exited at
        let mut exits = Vec::new();
        for event in events {
            match event {
                Event::Prompt(tokens) if tokens <= sequence.room() => {
                    step(&mut backend, &mut sequence, tokens, total, 1)?;
                    exits.extend(vec![total; tokens]);
                }
                Event::Decode(limit) if sequence.room() > 0 => {
                    let exit = step(&mut backend, &mut sequence, 1, limit, 1)?;
                    let expected = expected_exit(&sizes, &allowed, limit);
                    prop_assert_eq!((exit.layer, exit.reason), expected);
                    exits.push(exit.layer);
                }
                Event::Verify(tokens) if tokens <= sequence.room() => {
                    step(&mut backend, &mut sequence, tokens, total, tokens)?;
                    exits.extend(vec![total; tokens]);
                }
                Event::Truncate(tokens) => {
                    exits.truncate(exits.len().saturating_sub(tokens));
                    sequence.truncate(exits.len());
                }
                Event::Complete => {
                    step(&mut backend, &mut sequence, 0, total, 0)?;
                }
                Event::Prompt(tokens) | Event::Verify(tokens) => {
                    prop_assert!(step(&mut backend, &mut sequence, tokens, total, 1).is_err());
                }
                Event::Decode(limit) => {
                    prop_assert!(step(&mut backend, &mut sequence, 1, limit, 1).is_err());
                }
            }
            prop_assert_eq!(sequence.kv().length(), exits.len());
            prop_assert_eq!(sequence.tokens().len(), exits.len());
        }
        step(&mut backend, &mut sequence, 0, total, 0)?;
        for (layer, cache) in caches.lock().unwrap().iter().enumerate() {
            for (position, &exit_layer) in exits.iter().enumerate() {
                let ran = layer < exit_layer || kv_fill == KvFill::Defer;
                let expected = if ran { Source::Run } else { Source::Fill { exit_layer } };
                prop_assert_eq!(cache[position], Some(expected));
            }
        }
    }

    #[test]
    fn a_truncated_state_lacks_exactly_what_was_cut(
        depths in prop::collection::vec(1..=6_usize, 1..40),
        cut in 0..40_usize,
    ) {
        let mut kv = KvState::new(6, 64);
        for &depth in &depths {
            let positions = kv.begin(1)?;
            for layer in 0..depth {
                kv.fill(layer, positions.end);
            }
        }
        let before: Vec<usize> = (0..6).map(|layer| kv.filled(layer)).collect();
        kv.truncate(cut);
        prop_assert_eq!(kv.length(), depths.len().min(cut));
        prop_assert_eq!(kv.room(), 64 - kv.length());
        for (layer, filled) in before.into_iter().enumerate() {
            prop_assert_eq!(kv.filled(layer), filled.min(cut));
            prop_assert_eq!(kv.pending(layer, kv.length()).end, kv.length());
        }
    }
}

#[test]
fn an_interrupt_stops_between_engines() {
    let mut backend = HostDecided::new(Recorder::new(&[1, 1], 256, Caches::default()), &[1, 2], 8);
    let mut sequence = backend.open(KvFill::Propagate).unwrap();
    step(&mut backend, &mut sequence, 1, 2, 1).unwrap();
    let interrupt = Interrupt::default();
    interrupt.raise();
    let interrupted = SequenceStep {
        sequence: &mut sequence,
        tokens: &[0],
        rule: None,
        max_depth: 2,
        logits: LogitsRequest::Rows(1),
        ahead: Ahead::default(),
        next_draft: None,
    };
    assert!(backend.step(&mut [interrupted], &interrupt).is_err());
    // the only slot is taken until the sequence is dropped
    assert!(backend.open(KvFill::Propagate).is_err());
    drop(sequence);
    assert_eq!(backend.open(KvFill::Propagate).unwrap().room(), 8);
}

#[test]
fn a_verification_of_what_waits_ends_with_the_newest() {
    for waiting in [16, 17, 20, 33, 40] {
        let engines = Recorder::new(&[1, 1, 1], 16, Caches::default());
        let mut backend = HostDecided::new(engines, &[1, 2, 3], 64);
        let mut sequence = backend.open(KvFill::Defer).unwrap();
        for limit in [1, 2, 1].into_iter().cycle().take(waiting) {
            step(&mut backend, &mut sequence, 1, limit, 1).unwrap();
        }
        // as many logits as a pass can have; the engines complain where one is not in it
        step(&mut backend, &mut sequence, 0, 3, 16).unwrap();
        assert_eq!(sequence.kv().filled(2), waiting);
    }
}
