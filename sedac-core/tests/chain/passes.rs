//! A backend that turns steps into passes gives what one does that runs engine by engine: outcomes,
//! and what caches hold.

use std::ops::Range;

use super::toy::{CAPACITY, Cache, Caches, Toy, ToyKernel, VOCABULARY, ends};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use sedac_core::Error;
use sedac_core::backend::cuda::CudaChain;
use sedac_core::backend::{
    Ahead, Backend, HostDecided, LogitsRequest, MARGIN_BINS, MAX_AHEAD, SequenceStep, StepOutcome,
};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::{Criterion, ExitPolicy, ExitReason, ExitRule, Signal, Stability};
use sedac_core::sampler::{Sampler, Sampling};
use sedac_core::sequence::Sequence;

/// What a sequence does next.
#[derive(Debug, Clone)]
enum Planned {
    Step {
        tokens: Vec<u32>,
        /// Which of the two rules decides.
        rule: Option<usize>,
        max_depth: usize,
        /// Logits of this share of the new tokens, in eighths.
        logits: usize,
        wants: Wants,
    },
    /// Run what waits at full depth.
    Complete,
    /// Forget this many of the newest tokens.
    Truncate(usize),
}

/// What is wanted of logits.
#[derive(Debug, Clone)]
enum Wants {
    Rows,
    Tokens,
    Sampled(Sampling),
}

fn wants() -> impl Strategy<Value = Wants> {
    let sampling = (0.2..2.0_f32, 0..4_usize, 0.3..1.0_f32, any::<u64>());
    let sampling = sampling.prop_map(|(temperature, top_k, top_p, seed)| Sampling {
        temperature,
        top_k,
        top_p,
        seed,
        ..Sampling::default()
    });
    prop_oneof![
        Just(Wants::Rows),
        Just(Wants::Tokens),
        sampling.prop_map(Wants::Sampled),
    ]
}

fn planned() -> impl Strategy<Value = Planned> {
    let tokens = |range: Range<usize>| prop::collection::vec(0..VOCABULARY as u32, range);
    // prompts, whose last pass of the toy on the host, of up to 16 tokens, has more than 8
    let prompt =
        (1..4_usize).prop_flat_map(move |passes| tokens(16 * passes + 9..16 * passes + 17));
    let tokens = prop_oneof![4 => tokens(1..2), 2 => tokens(1..6), 1 => tokens(1..17), 1 => prompt];
    let step = (
        tokens,
        prop::option::of(0..2_usize),
        1..10_usize,
        0..=8_usize,
        wants(),
    )
        .prop_map(|(tokens, rule, max_depth, logits, wants)| Planned::Step {
            tokens,
            rule,
            max_depth,
            logits,
            wants,
        });
    prop_oneof![
        8 => step,
        1 => Just(Planned::Complete),
        1 => (1..6_usize).prop_map(Planned::Truncate),
    ]
}

/// The step of `planned`, None where it does not fit or is none.
fn step_of<'a>(
    planned: &'a Planned,
    sequence: &'a mut Sequence,
    rules: &'a [ExitRule; 2],
    layers: usize,
) -> Option<SequenceStep<'a>> {
    match planned {
        Planned::Step {
            tokens,
            rule,
            max_depth,
            logits,
            wants,
        } => {
            // rows of one pass, as the toy on the host has at most so many
            let rows = (tokens.len() * logits / 8).min(8);
            // beyond, the pass before goes deeper than the rule lets it, which leaves a trace where
            // skipped layers get something else than their own keys and values
            let one_pass = tokens.len() <= 8 || sequence.kv_fill() == KvFill::Defer;
            let rule = rule.filter(|_| one_pass).map(|index| &rules[index]);
            (tokens.len() <= sequence.room()).then_some(SequenceStep {
                sequence,
                tokens,
                rule,
                max_depth: *max_depth,
                logits: match wants {
                    _ if rows == 0 => LogitsRequest::None,
                    Wants::Rows => LogitsRequest::Rows(rows),
                    Wants::Tokens => LogitsRequest::Tokens(rows),
                    Wants::Sampled(sampling) => {
                        let race = Sampler::new(*sampling).unwrap().race(rows);
                        LogitsRequest::Sampled(race.unwrap())
                    }
                },
                ahead: Ahead::default(),
                next_draft: None,
            })
        }
        Planned::Complete => Some(completion(sequence, layers)),
        Planned::Truncate(count) => {
            sequence.truncate(sequence.tokens().len().saturating_sub(*count));
            None
        }
    }
}

pub(super) fn run(backend: &mut dyn Backend, steps: &mut [SequenceStep<'_>]) -> Vec<StepOutcome> {
    backend.step(steps, &Interrupt::default()).unwrap()
}

pub(super) fn rule(tau: f32, consecutive_k: usize, layers: usize) -> ExitRule {
    let stability = Stability {
        tau,
        consecutive_k: consecutive_k.min(layers),
        min_layer_ratio: 0.0,
    };
    stability.compile(layers).unwrap()
}

proptest! {
    #[test]
    fn passes_give_what_engines_give(
        engine_sizes in prop::collection::vec(1..=2_usize, 1..6),
        (tau, consecutive_k) in (0.3..1.0_f32, 1..3_usize),
        kv_fill in prop::sample::select(KvFill::ALL.to_vec()),
        plan in prop::collection::vec(planned(), 1..30),
    ) {
        let exits = ends(&engine_sizes);
        let layers = *exits.last().unwrap();
        let by_head = |depth: usize, signal| {
            Criterion::at_depth(ExitReason::Draft, layers, depth.min(layers), signal, 0.5)
        };
        let with_head = rule(0.9, 1, layers).or(by_head(2, Signal::Learned));
        let with_head = with_head.or(by_head(3, Signal::Margin));
        let rules = [rule(tau, consecutive_k, layers), with_head];
        let (ours, theirs) = (Caches::default(), Caches::default());
        let kernel = ToyKernel::new(&engine_sizes, 200, 1, &ours);
        let mut passes = CudaChain::new(kernel, layers, &exits, CAPACITY, 1);
        let toy = Toy::new(&engine_sizes, 200, &theirs);
        let mut engines = HostDecided::new(toy, &exits, CAPACITY);
        let mut sequence = passes.open(kv_fill).unwrap();
        let mut reference = engines.open(kv_fill).unwrap();
        for planned in &plan {
            let ours = step_of(planned, &mut sequence, &rules, layers);
            let theirs = step_of(planned, &mut reference, &rules, layers);
            if let (Some(ours), Some(theirs)) = (ours, theirs) {
                let mut ours = run(&mut passes, &mut [ours]).remove(0);
                let margins = std::mem::take(&mut ours.margins);
                prop_assert_eq!(margins.len(), ours.logits.tokens().len());
                prop_assert_eq!(ours, run(&mut engines, &mut [theirs]).remove(0));
            }
            // where waiting positions did not fit into a pass, they went deeper before
            for layer in 0..layers {
                prop_assert!(sequence.kv().filled(layer) >= reference.kv().filled(layer));
            }
        }
        let (ours, theirs) = (ours.lock().unwrap(), theirs.lock().unwrap());
        for (layer, (ours, theirs)) in ours.iter().zip(theirs.iter()).enumerate() {
            let filled = reference.kv().filled(layer);
            prop_assert_eq!(&ours[..filled], &theirs[..filled]);
        }
    }

    #[test]
    fn steps_ahead_are_single_steps(
        engine_sizes in prop::collection::vec(1..=2_usize, 1..5),
        seed in prop::option::of(0..100_u64),
        kv_fill in prop::sample::select(KvFill::ALL.to_vec()),
        tau in prop::option::of(0.3..1.0_f32),
        aheads in prop::collection::vec((1..=MAX_AHEAD, 1..10_usize, 0.0..1.0_f32), 1..8),
        sequences in 1..4_usize,
    ) {
        let exits = ends(&engine_sizes);
        let layers = *exits.last().unwrap();
        let kernel = ToyKernel::new(&engine_sizes, 200, sequences, &Caches::default());
        let mut ahead = CudaChain::new(kernel, layers, &exits, CAPACITY, sequences);
        let mut lanes: Vec<_> = (0..sequences as u32)
            .map(|first| Followed::new(first, seed, kv_fill, &mut ahead, &engine_sizes))
            .collect();
        let rule = tau.map(|tau| rule(tau, 1, layers));
        for &(tokens, max_depth, acceptance) in &aheads {
            let ahead_of = Ahead {
                acceptance: [acceptance; MARGIN_BINS],
                min_accepted: [0.2; MAX_AHEAD],
                ..Ahead::of(tokens)
            };
            let mut steps: Vec<_> = lanes
                .iter_mut()
                .map(|lane| lane.step(rule.as_ref(), max_depth, ahead_of))
                .collect();
            let outcomes = run(&mut ahead, &mut steps);
            for (lane, outcome) in lanes.iter_mut().zip(outcomes) {
                prop_assert!((1..=tokens).contains(&outcome.logits.tokens().len()));
                prop_assert_eq!(outcome.margins.len(), outcome.logits.tokens().len());
                lane.check(&outcome, rule.as_ref(), max_depth)?;
            }
        }
    }

    #[test]
    fn sequences_of_one_pass_run_as_alone(
        engine_sizes in prop::collection::vec(1..=2_usize, 1..5),
        tau in 0.3..1.0_f32,
        kv_fill in prop::sample::select(KvFill::ALL.to_vec()),
        rounds in prop::collection::vec(prop::collection::vec(planned(), 5), 1..12),
    ) {
        const SEQUENCES: usize = 5;
        let exits = ends(&engine_sizes);
        let layers = *exits.last().unwrap();
        let rules = [rule(tau, 1, layers), rule(0.7, 1, layers)];
        let chain = |slots| {
            let kernel = ToyKernel::new(&engine_sizes, 200, slots, &Caches::default());
            CudaChain::new(kernel, layers, &exits, CAPACITY, slots)
        };
        let mut together = chain(SEQUENCES);
        let open = |_| together.open(kv_fill).unwrap();
        let mut sequences: Vec<_> = (0..SEQUENCES).map(open).collect();
        prop_assert!(together.open(kv_fill).is_err());
        let mut alone: Vec<_> = (0..SEQUENCES).map(|_| chain(1)).collect();
        let mut apart: Vec<_> = alone.iter_mut().map(|chain| chain.open(kv_fill).unwrap()).collect();
        for round in &rounds {
            let pairs = round.iter().zip(&mut sequences);
            let steps = pairs.filter_map(|(planned, sequence)| {
                step_of(planned, sequence, &rules, layers)
            });
            let mut steps: Vec<_> = steps.collect();
            let mut outcomes = run(&mut together, &mut steps).into_iter();
            for (index, planned) in round.iter().enumerate() {
                if let Some(step) = step_of(planned, &mut apart[index], &rules, layers) {
                    prop_assert_eq!(outcomes.next(), run(&mut alone[index], &mut [step]).pop());
                }
            }
        }
        // how soon exits are continued depends on company
        let steps = sequences.iter_mut().map(|sequence| completion(sequence, layers));
        run(&mut together, &mut steps.collect::<Vec<_>>());
        for (index, (sequence, alone)) in sequences.iter().zip(&mut alone).enumerate() {
            run(alone, &mut [completion(&mut apart[index], layers)]);
            prop_assert_eq!(sequence.tokens(), apart[index].tokens());
            let length = sequence.tokens().len();
            let held = |cache: Cache| cache.into_iter().map(move |layer| layer[..length].to_vec());
            let caches = [together.device().cache(sequence.slot()), alone.device().cache(0)];
            let [ours, theirs] = caches.map(|cache| held(cache).collect::<Vec<_>>());
            prop_assert_eq!(ours, theirs);
        }
    }
}

/// A sequence that goes ahead, and one of another backend that takes its tokens one by one.
struct Followed {
    sequence: Sequence,
    sampler: Sampler,
    newest: [u32; 1],
    reference: Sequence,
    engines: HostDecided<Toy>,
}

impl Followed {
    fn new(
        first: u32,
        seed: Option<u64>,
        kv_fill: KvFill,
        ahead: &mut CudaChain<ToyKernel>,
        engine_sizes: &[usize],
    ) -> Self {
        let sampling = Sampling {
            temperature: seed.map_or(0.0, |_| 0.8),
            seed: seed.unwrap_or(0) + u64::from(first),
            ..Sampling::default()
        };
        let toy = Toy::new(engine_sizes, 200, &Caches::default());
        let mut engines = HostDecided::new(toy, &ends(engine_sizes), CAPACITY);
        Self {
            sequence: ahead.open(kv_fill).unwrap(),
            sampler: Sampler::new(sampling).unwrap(),
            newest: [first],
            reference: engines.open(kv_fill).unwrap(),
            engines,
        }
    }

    fn step<'a>(
        &'a mut self,
        rule: Option<&'a ExitRule>,
        max_depth: usize,
        ahead: Ahead,
    ) -> SequenceStep<'a> {
        SequenceStep {
            sequence: &mut self.sequence,
            tokens: &self.newest,
            rule,
            max_depth,
            logits: LogitsRequest::of(&mut self.sampler, ahead.tokens),
            ahead,
            next_draft: None,
        }
    }

    /// The tokens of `outcome` are those of single steps, and the sequence is as after these.
    fn check(
        &mut self,
        outcome: &StepOutcome,
        rule: Option<&ExitRule>,
        max_depth: usize,
    ) -> Result<(), TestCaseError> {
        let tokens = outcome.logits.tokens();
        prop_assert_eq!(outcome.exits_ahead.len(), tokens.len() - 1);
        for (index, &token) in tokens.iter().enumerate() {
            let step = SequenceStep {
                sequence: &mut self.reference,
                tokens: &self.newest,
                rule,
                max_depth,
                logits: LogitsRequest::of(&mut self.sampler, 1),
                ahead: Ahead::default(),
                next_draft: None,
            };
            let single = run(&mut self.engines, &mut [step]).remove(0);
            prop_assert_eq!(single.exit, outcome.exit_of(index));
            prop_assert_eq!(single.logits.tokens(), &[token]);
            self.sampler.skip();
            self.newest = [token];
        }
        prop_assert_eq!(self.sequence.tokens(), self.reference.tokens());
        for layer in 0..self.engines.num_layers() {
            prop_assert!(self.sequence.kv().filled(layer) >= self.reference.kv().filled(layer));
        }
        Ok(())
    }
}

pub(super) fn chain(slots: usize) -> CudaChain<ToyKernel> {
    let kernel = ToyKernel::new(&[1; 4], 200, slots, &Caches::default());
    CudaChain::new(kernel, 4, &[1, 2, 3, 4], CAPACITY, slots)
}

/// What runs all that waits.
pub(super) fn completion(sequence: &mut Sequence, layers: usize) -> SequenceStep<'_> {
    SequenceStep {
        logits: LogitsRequest::None,
        ..step(sequence, &[], layers)
    }
}

pub(super) fn step<'a>(
    sequence: &'a mut Sequence,
    tokens: &'a [u32],
    max_depth: usize,
) -> SequenceStep<'a> {
    SequenceStep {
        sequence,
        tokens,
        rule: None,
        max_depth,
        logits: LogitsRequest::Tokens(1),
        ahead: Ahead::default(),
        next_draft: None,
    }
}

#[test]
fn a_batch_is_one_pass_and_a_prompt_several() {
    let mut chain = chain(8);
    let mut sequences: Vec<_> = (0..8).map(|_| chain.open(KvFill::Defer).unwrap()).collect();
    let mut steps: Vec<_> = sequences
        .iter_mut()
        .map(|sequence| step(sequence, &[1], 4))
        .collect();
    run(&mut chain, &mut steps);
    run(&mut chain, &mut [step(&mut sequences[0], &[2; 19], 2)]);
    assert_eq!(chain.device().passes, [8, 8, 8, 3]);
}

#[test]
fn exits_wait_for_free_until_a_token_goes_deeper_or_a_pass_is_full() {
    let mut chain = chain(1);
    let mut sequence = chain.open(KvFill::Defer).unwrap();
    for _ in 0..10 {
        run(&mut chain, &mut [step(&mut sequence, &[1], 2)]);
    }
    assert_eq!(chain.device().passes, [1; 10]);
    run(&mut chain, &mut [step(&mut sequence, &[1], 4)]);
    assert_eq!(chain.device().passes[10..], [8, 3]);
    assert_eq!(sequence.kv().filled(3), 11);
}

#[test]
fn logits_that_are_no_numbers_are_an_error_with_the_position() {
    let mut kernel = ToyKernel::new(&[1; 4], 200, 1, &Caches::default());
    kernel.poison = Some(3);
    let mut chain = CudaChain::new(kernel, 4, &[1, 2, 3, 4], CAPACITY, 1);
    let mut sequence = chain.open(KvFill::Defer).unwrap();
    let mut failing = step(&mut sequence, &[1, 3, 2], 4);
    failing.logits = LogitsRequest::Rows(3);
    let error = chain.step(&mut [failing], &Interrupt::default());
    let Err(Error::NotFinite { position, engine }) = error else {
        panic!("{error:?}");
    };
    assert_eq!((position, engine), (1, None));
    let cache = chain.device().cache(0);
    assert!(cache.iter().flatten().all(Option::is_none));
}

#[test]
fn an_interrupt_is_noticed_between_passes() {
    let mut chain = chain(1);
    let mut sequence = chain.open(KvFill::Defer).unwrap();
    let interrupt = Interrupt::default();
    interrupt.raise();
    let error = chain.step(&mut [step(&mut sequence, &[1], 4)], &interrupt);
    assert!(matches!(error, Err(Error::Cancelled)));
    assert!(chain.device().passes.is_empty());
}
