//! Passes that go on by themselves: which do, and what they give.

use sedac_core::backend::{Ahead, Backend, LogitsRequest, SequenceStep};
use sedac_core::kv::KvFill;
use sedac_core::policy::{Criterion, ExitReason, ExitRule, Signal};
use sedac_core::sequence::Sequence;

use super::passes::{chain, rule, run, step};

#[test]
fn a_step_ahead_is_one_pass() {
    let mut backend = chain(2);
    let mut sequences = [0, 1].map(|_| backend.open(KvFill::Defer).unwrap());
    let [first, second] = &mut sequences;
    fn ahead(sequence: &mut Sequence, tokens: usize) -> SequenceStep<'_> {
        SequenceStep {
            logits: LogitsRequest::Tokens(tokens),
            ahead: Ahead::of(tokens),
            next_draft: None,
            ..step(sequence, &[1], 4)
        }
    }
    let alone = run(&mut backend, &mut [ahead(first, 4)]);
    assert_eq!(alone[0].logits.tokens().len(), 4);
    // two sequences share the rows of a pass
    let together = run(&mut backend, &mut [ahead(first, 8), ahead(second, 3)]);
    let tokens: Vec<_> = together
        .iter()
        .map(|outcome| outcome.logits.tokens().len())
        .collect();
    assert_eq!(
        tokens,
        [1, 1],
        "the first is before the beginning of a chunk"
    );
    assert_eq!(backend.device().passes, [1, 2]);
    assert_eq!((first.tokens().len(), second.tokens().len()), (5, 1));
}

#[test]
fn a_step_goes_on_after_exits_that_fill_caches() {
    let rule = rule(0.0, 1, 4);
    let mut backend = chain(2);
    for (kv_fill, tokens, filled) in [(KvFill::Propagate, 5, 5), (KvFill::Defer, 1, 0)] {
        let mut sequence = backend.open(kv_fill).unwrap();
        let mut ahead = SequenceStep {
            logits: LogitsRequest::Tokens(8),
            ahead: Ahead::of(8),
            rule: Some(&rule),
            ..step(&mut sequence, &[1], 4)
        };
        let outcome = run(&mut backend, std::slice::from_mut(&mut ahead)).remove(0);
        // as far as a chunk of attention goes
        assert_eq!(outcome.logits.tokens().len(), tokens);
        let exits: Vec<_> = (0..tokens).map(|index| outcome.exit_of(index)).collect();
        assert!(exits.iter().all(|exit| exit.layer == 1), "{exits:?}");
        assert_eq!(sequence.kv().filled(3), filled);
    }
    assert_eq!(backend.device().passes, [1, 1]);
}

#[test]
fn a_pass_does_not_go_on_while_others_wait_for_theirs() {
    let mut backend = chain(9);
    let mut sequences: Vec<_> = (0..9)
        .map(|_| backend.open(KvFill::Propagate).unwrap())
        .collect();
    // exit heads are read in passes only
    let criterion = Criterion::at_depth(ExitReason::Draft, 4, 2, Signal::Margin, 0.5);
    let rule = ExitRule::new(criterion);
    let steps = sequences.iter_mut().map(|sequence| SequenceStep {
        logits: LogitsRequest::Tokens(8),
        ahead: Ahead::of(8),
        rule: Some(&rule),
        ..step(sequence, &[1], 4)
    });
    let outcomes = run(&mut backend, &mut steps.collect::<Vec<_>>());
    assert_eq!(backend.device().passes, [8, 1]);
    for outcome in outcomes {
        assert_eq!(outcome.logits.tokens().len(), 1);
    }
}
