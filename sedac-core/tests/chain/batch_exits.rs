//! Rows that may exit are in batches too, and give what they give alone.

use std::slice::from_mut;

use sedac_core::backend::cuda::CudaChain;
use sedac_core::backend::{Backend, LogitsRequest, SequenceStep, StepOutcome};
use sedac_core::kv::KvFill;
use sedac_core::policy::{ByDepth, ExitPolicy, ExitRule, Margin, Probe, Stability};
use sedac_core::sampler::{Sampler, Sampling};
use sedac_core::sequence::Sequence;

use super::passes::{chain, completion, run, step};
use super::toy::ToyKernel;

const LAYERS: usize = 4;
const SEQUENCES: usize = 20;

fn stability(tau: f32, consecutive_k: usize) -> ExitRule {
    let stability = Stability {
        tau,
        consecutive_k,
        min_layer_ratio: 0.0,
    };
    stability.compile(LAYERS).unwrap()
}

fn by_depth(threshold: f32) -> ByDepth {
    (1..LAYERS).map(|depth| (depth, threshold)).collect()
}

fn probe(threshold: f32) -> ExitRule {
    let thresholds = by_depth(threshold);
    Probe { thresholds }.compile(LAYERS).unwrap()
}

fn margin(threshold: f32) -> ExitRule {
    let thresholds = by_depth(threshold);
    Margin { thresholds }.compile(LAYERS).unwrap()
}

/// Sequences of one chain, and each of them in a chain of its own.
struct Pairs {
    together: CudaChain<ToyKernel>,
    sequences: Vec<Sequence>,
    alone: Vec<(CudaChain<ToyKernel>, Sequence)>,
}

impl Pairs {
    fn new(kv_fill: KvFill) -> Self {
        let mut together = chain(SEQUENCES);
        let open = |_| together.open(kv_fill).unwrap();
        let sequences = (0..SEQUENCES).map(open).collect();
        let alone = (0..SEQUENCES).map(|_| {
            let mut chain = chain(1);
            let sequence = chain.open(kv_fill).unwrap();
            (chain, sequence)
        });
        Self {
            alone: alone.collect(),
            together,
            sequences,
        }
    }

    /// Append a token to each of the first `count` sequences, about which its rule decides. Returns
    /// where they stopped, once that is the same alone.
    fn step(&mut self, round: u32, count: usize, rules: &[ExitRule]) -> Vec<usize> {
        let tokens: Vec<_> = (0..count as u32).map(|index| [round * 5 + index]).collect();
        let each = tokens.iter().zip(rules.iter().cycle());
        let steps = self.sequences.iter_mut().zip(each.clone());
        let steps = steps.map(|(sequence, (token, rule))| decided(sequence, token, rule));
        let outcomes = run(&mut self.together, &mut steps.collect::<Vec<_>>());
        let alone = self.alone.iter_mut().zip(each);
        let alone = alone.map(|((chain, sequence), (token, rule))| -> StepOutcome {
            run(chain, from_mut(&mut decided(sequence, token, rule))).remove(0)
        });
        assert_eq!(outcomes, alone.collect::<Vec<_>>());
        outcomes.iter().map(|outcome| outcome.exit.layer).collect()
    }

    /// Check that all layers hold the same, once they hold all positions.
    fn check_caches(&mut self) {
        let steps = self.sequences.iter_mut();
        let steps = steps.map(|sequence| completion(sequence, LAYERS));
        run(&mut self.together, &mut steps.collect::<Vec<_>>());
        for (sequence, (chain, alone)) in self.sequences.iter().zip(&mut self.alone) {
            run(chain, &mut [completion(alone, LAYERS)]);
            let cache = self.together.device().cache(sequence.slot());
            assert_eq!(cache, chain.device().cache(0));
        }
    }

    /// The numbers of rows of passes and of batches so far.
    fn sizes(&self) -> (Vec<usize>, Vec<usize>) {
        let device = self.together.device();
        let batches = device.batches.lock().unwrap().clone();
        (device.passes.clone(), batches)
    }
}

/// A step of a token that is sampled, about which `rule` decides.
fn decided<'a>(
    sequence: &'a mut Sequence,
    token: &'a [u32],
    rule: &'a ExitRule,
) -> SequenceStep<'a> {
    let sampling = Sampling {
        temperature: 0.8,
        seed: u64::from(token[0]),
        ..Sampling::default()
    };
    SequenceStep {
        rule: Some(rule),
        logits: LogitsRequest::of(&mut Sampler::new(sampling).unwrap(), 1),
        ..step(sequence, token, LAYERS)
    }
}

#[test]
fn rows_of_a_batch_exit_as_alone_and_none_of_them_waits() {
    let rules = [stability(0.5, 1), probe(0.4), stability(0.3, 2)];
    for kv_fill in KvFill::ALL {
        let mut pairs = Pairs::new(kv_fill);
        let mut exits = [0; LAYERS + 1];
        for round in 0..6 {
            let layers = pairs.step(round, SEQUENCES, &rules);
            layers.into_iter().for_each(|layer| exits[layer] += 1);
            let filled = |sequence: &Sequence| sequence.kv().filled(LAYERS - 1);
            let held = pairs.sequences.iter().map(filled);
            assert!(held.into_iter().all(|filled| filled == round as usize + 1));
        }
        assert!(exits[1..].iter().all(|&count| count > 2), "{exits:?}");
        assert_eq!(pairs.sizes(), (vec![], vec![SEQUENCES; 6]));
        pairs.check_caches();
    }
}

#[test]
fn what_waits_runs_before_a_batch() {
    let rules = [stability(0.0, 1)];
    // where caches are filled at once, nothing waits
    for (kv_fill, passes) in [(KvFill::Defer, vec![3, 3]), (KvFill::Propagate, vec![3])] {
        let mut pairs = Pairs::new(kv_fill);
        assert_eq!(pairs.step(0, 3, &rules), [1; 3]);
        assert_eq!(pairs.step(1, SEQUENCES, &rules), [1; SEQUENCES]);
        assert_eq!(pairs.sizes(), (passes, vec![SEQUENCES]));
        pairs.check_caches();
    }
}

#[test]
fn what_waits_runs_apart_where_a_pass_does_not_hold_it_beside_the_new() {
    // batches know no exit heads
    let rules = [margin(0.0)];
    let deferred = vec![4, 8, 8, 4, 4, 8, 1];
    for (kv_fill, passes) in [
        (KvFill::Defer, deferred),
        (KvFill::Propagate, vec![4, 4, 4, 8, 1]),
    ] {
        let mut pairs = Pairs::new(kv_fill);
        for round in 0..3 {
            assert_eq!(pairs.step(round, 4, &rules), [1; 4]);
        }
        assert_eq!(pairs.step(3, 9, &rules), [1; 9]);
        assert_eq!(pairs.sizes(), (passes, vec![]));
        pairs.check_caches();
    }
}

#[test]
fn a_prompt_does_not_run_in_passes_for_a_row_that_a_batch_awaits() {
    let (mut chain, rule) = (chain(2), stability(0.0, 1));
    let [mut prefilled, mut exiting] = [0, 1].map(|_| chain.open(KvFill::Defer).unwrap());
    run(&mut chain, &mut [decided(&mut exiting, &[1], &rule)]);
    let prompt = step(&mut prefilled, &[2; 30], LAYERS);
    run(
        &mut chain,
        &mut [prompt, decided(&mut exiting, &[3], &rule)],
    );
    // what exited before is continued first
    assert_eq!(chain.device().passes, [1, 1]);
    assert_eq!(*chain.device().batches.lock().unwrap(), [31]);
}
