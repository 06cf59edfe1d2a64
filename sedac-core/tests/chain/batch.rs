//! Steps of several sequences at once give what each gives alone.

use super::toy::{Caches, ToyDevice, VOCABULARY, ends};
use proptest::prelude::*;
use sedac_core::backend::{Ahead, Backend, LogitsRequest, SequenceStep, StepOutcome};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::{ByDepth, ExitPolicy, ExitRule, Learned};
use sedac_core::sequence::Sequence;

/// What one sequence runs in one step.
#[derive(Debug, Clone)]
struct Planned {
    tokens: Vec<u32>,
    with_rule: bool,
    max_depth: usize,
}

fn planned() -> impl Strategy<Value = Planned> {
    let tokens = prop::collection::vec(0..VOCABULARY as u32, 1..4);
    (tokens, any::<bool>(), 1..8_usize).prop_map(|(tokens, with_rule, max_depth)| Planned {
        tokens,
        with_rule,
        max_depth,
    })
}

fn step_of<'a>(
    planned: &'a Planned,
    sequence: &'a mut Sequence,
    rule: &'a ExitRule,
) -> SequenceStep<'a> {
    SequenceStep {
        sequence,
        tokens: &planned.tokens,
        rule: planned.with_rule.then_some(rule),
        max_depth: planned.max_depth,
        logits: LogitsRequest::Rows(1),
        ahead: Ahead::default(),
        next_draft: None,
    }
}

fn run(device: &mut ToyDevice, steps: &mut [SequenceStep<'_>]) -> Vec<StepOutcome> {
    device.step(steps, &Interrupt::default()).unwrap()
}

proptest! {
    #[test]
    fn three_sequences_at_once_run_as_alone(
        engine_sizes in prop::collection::vec(1..=2_usize, 2..5),
        threshold in 0.1..1.0_f32,
        rounds in prop::collection::vec(prop::array::uniform3(planned()), 1..12),
    ) {
        let exits = ends(&engine_sizes);
        let layers = *exits.last().unwrap();
        let thresholds: ByDepth = exits.iter().map(|&depth| (depth, threshold)).collect();
        let rule = Learned { thresholds }.compile(layers).unwrap();
        let device = || ToyDevice::new(&engine_sizes, 200, &Caches::default());
        let mut together = device();
        let mut sequences: Vec<_> =
            (0..3).map(|_| together.open(KvFill::Defer).unwrap()).collect();
        prop_assert!(together.open(KvFill::Defer).is_err());
        let mut alone: Vec<_> = (0..3).map(|_| device()).collect();
        let mut apart: Vec<_> =
            alone.iter_mut().map(|device| device.open(KvFill::Defer).unwrap()).collect();
        for round in &rounds {
            let pairs = round.iter().zip(&mut sequences);
            let mut steps: Vec<_> =
                pairs.map(|(planned, sequence)| step_of(planned, sequence, &rule)).collect();
            let outcomes = run(&mut together, &mut steps);
            for (index, outcome) in outcomes.iter().enumerate() {
                let step = step_of(&round[index], &mut apart[index], &rule);
                prop_assert_eq!(outcome, &run(&mut alone[index], &mut [step])[0]);
            }
        }
        for (index, (sequence, alone)) in sequences.iter().zip(&alone).enumerate() {
            prop_assert_eq!(sequence.tokens(), apart[index].tokens());
            prop_assert_eq!(together.cache(sequence.slot()), alone.cache(0));
        }
    }
}
