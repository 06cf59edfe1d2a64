//! Any sequence of prompts, exits and fills leaves each layer with exactly one entry per position.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::Range;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sedac_core::Result;
use sedac_core::backend::{Backend, Engines, HostDecided};
use sedac_core::exit_config::KvFill;
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvState;
use sedac_core::policy::{ExitReason, ExitSignals, Forced};

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
    most_tokens: usize,
    caches: Caches,
    kept: Vec<Option<usize>>,
    pass: Range<usize>,
    depth: usize,
    stability: Vec<f32>,
}

impl Recorder {
    fn new(engine_sizes: &[usize], most_tokens: usize, caches: Caches) -> Self {
        let mut layers = Vec::new();
        let mut next = 0;
        for &size in engine_sizes {
            layers.push(next..next + size);
            next += size;
        }
        *caches.lock().unwrap() = vec![vec![None; CAPACITY]; next];
        Self {
            layers,
            most_tokens,
            caches,
            kept: vec![None; CAPACITY],
            pass: 0..0,
            depth: 0,
            stability: vec![1.0; next],
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

    fn most_tokens(&self) -> usize {
        self.most_tokens
    }

    fn embed(&mut self, tokens: &[u32], start: usize) -> Result<()> {
        self.pass = start..start + tokens.len();
        self.depth = 0;
        // what lay beyond was rolled back
        for cache in self.caches.lock().unwrap().iter_mut() {
            cache[start..].fill(None);
        }
        self.kept[start..].fill(None);
        Ok(())
    }

    fn run(&mut self, engine: usize) -> Result<()> {
        assert!(self.pass.len() <= self.most_tokens, "a pass too long");
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

    fn run_attention(&mut self, engine: usize) -> Result<()> {
        self.run(engine)
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

    fn stability(&self, engine: usize) -> &[f32] {
        &self.stability[self.layers[engine].clone()]
    }

    fn resume(&mut self, positions: Range<usize>, engine: usize) -> Result<()> {
        self.depth = self.layers[engine].start;
        for position in positions.clone() {
            let depth = self.kept[position].expect("resumed from a kept hidden state");
            assert_eq!(depth, self.depth, "position {position} waits elsewhere");
        }
        self.pass = positions;
        Ok(())
    }

    fn keep(&mut self, positions: Range<usize>) -> Result<()> {
        if positions.is_empty() {
            return Ok(());
        }
        assert_eq!(positions, self.pass, "the whole pass is kept");
        for position in positions {
            self.kept[position] = Some(self.depth);
        }
        Ok(())
    }

    fn fill(&mut self, layer: usize, positions: Range<usize>) -> Result<()> {
        assert!((1..=self.most_tokens).contains(&positions.len()));
        for position in positions {
            let exit_layer = self.kept[position].expect("filled from a kept hidden state");
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

/// The depth that a token forced to `wanted` really exits at, and why.
fn expected_exit(sizes: &[usize], allowed: &[usize], wanted: usize) -> (usize, ExitReason) {
    let total: usize = sizes.iter().sum();
    let mut end = 0;
    for size in sizes {
        end += size;
        if end >= wanted && end < total && allowed.contains(&end) {
            return (end, ExitReason::Forced);
        }
    }
    (total, ExitReason::FullDepth)
}

fn kv_fills() -> impl Strategy<Value = KvFill> {
    prop::sample::select(KvFill::ALL.to_vec())
}

proptest! {
    #[test]
    fn every_layer_holds_one_entry_per_position(
        sizes in engine_sizes(),
        // at least what a verification has
        most_tokens in 5..20_usize,
        forbidden in 1..16_usize,
        kv_fill in kv_fills(),
        events in events(),
    ) {
        let caches = Caches::default();
        let total: usize = sizes.iter().sum();
        let allowed: Vec<usize> = (1..=total).filter(|&depth| depth != forbidden).collect();
        let engines = Recorder::new(&sizes, most_tokens, caches.clone());
        let mut backend = HostDecided::new(engines, &allowed, CAPACITY);
        backend.reset(kv_fill);
        let interrupt = Interrupt::default();
        // the depth each position exited at
        let mut exits = Vec::new();
        for event in events {
            match event {
                Event::Prompt(tokens) if tokens <= backend.room() => {
                    backend.prefill(&vec![0; tokens], &interrupt)?;
                    exits.extend(vec![total; tokens]);
                }
                Event::Decode(wanted) if backend.room() > 0 => {
                    let mut policy = Forced::new(vec![wanted]);
                    let step = backend.decode(0, &mut policy, &interrupt)?;
                    let expected = expected_exit(&sizes, &allowed, wanted);
                    prop_assert_eq!((step.exit_layer, step.reason), expected);
                    exits.push(step.exit_layer);
                }
                Event::Verify(tokens) if tokens <= backend.room() => {
                    backend.verify(&vec![0; tokens], tokens, &interrupt)?;
                    exits.extend(vec![total; tokens]);
                }
                Event::Truncate(tokens) => {
                    exits.truncate(exits.len().saturating_sub(tokens));
                    backend.truncate(exits.len());
                }
                Event::Complete => backend.complete(&interrupt)?,
                Event::Prompt(tokens) | Event::Verify(tokens) => {
                    prop_assert!(backend.prefill(&vec![0; tokens], &interrupt).is_err());
                }
                Event::Decode(wanted) => {
                    let mut policy = Forced::new(vec![wanted]);
                    prop_assert!(backend.decode(0, &mut policy, &interrupt).is_err());
                }
            }
            prop_assert_eq!(backend.kv().length(), exits.len());
        }
        backend.complete(&interrupt)?;
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
    let interrupt = Interrupt::default();
    backend.prefill(&[0], &interrupt).unwrap();
    interrupt.raise();
    let mut policy = Forced::new(vec![2]);
    assert!(backend.decode(0, &mut policy, &interrupt).is_err());
    backend.reset(KvFill::Propagate);
    assert_eq!(backend.room(), 8);
}

#[test]
fn a_verification_of_what_waits_ends_with_the_newest() {
    for waiting in [16, 17, 20, 33, 40] {
        let engines = Recorder::new(&[1, 1, 1], 16, Caches::default());
        let mut backend = HostDecided::new(engines, &[1, 2, 3], 64);
        backend.reset(KvFill::Defer);
        let interrupt = Interrupt::default();
        let mut policy = Forced::new(vec![1, 2, 1]);
        for _ in 0..waiting {
            backend.decode(0, &mut policy, &interrupt).unwrap();
        }
        // as many logits as a pass can have; the engines complain where one is not in it
        backend.verify(&[], 16, &interrupt).unwrap();
        assert_eq!(backend.kv().filled(2), waiting);
    }
}
