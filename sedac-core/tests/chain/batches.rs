//! Rows that go through every layer are batches where they are more than a pass holds.

use sedac_core::backend::cuda::CudaChain;
use sedac_core::backend::{Backend, LogitsRequest};
use sedac_core::kv::KvFill;
use sedac_core::sequence::Sequence;

use super::passes::{chain, run, step};
use super::toy::ToyKernel;

fn batches(chain: &CudaChain<ToyKernel>) -> Vec<usize> {
    chain.device().batches.lock().unwrap().clone()
}

#[test]
fn more_rows_than_a_pass_holds_are_a_batch_where_all_go_through_every_layer() {
    let mut chain = chain(12);
    let open = |_| chain.open(KvFill::Defer).unwrap();
    let mut sequences: Vec<_> = (0..12).map(open).collect();
    let mut steps = |sequences: &mut [Sequence], limited: usize| {
        let limit = |index| if index < limited { 2 } else { 4 };
        let sequences = sequences.iter_mut().enumerate();
        let steps = sequences.map(|(index, sequence)| step(sequence, &[1], limit(index)));
        run(&mut chain, &mut steps.collect::<Vec<_>>());
        (batches(&chain), chain.device().passes.clone())
    };
    assert_eq!(steps(&mut sequences, 0), (vec![12], vec![]));
    assert_eq!(steps(&mut sequences, 3), (vec![12, 9], vec![3]));
    // eight are a pass, and what waits is one, too
    assert_eq!(steps(&mut sequences[..8], 0), (vec![12, 9], vec![3, 8, 3]));
}

#[test]
fn what_batches_of_few_rows_take_is_known() {
    let mut chain = chain(1);
    let mut sequence = chain.open(KvFill::Defer).unwrap();
    // the first of each size does not count
    for _ in 0..2 {
        run(&mut chain, &mut [step(&mut sequence, &[1; 12], 4)]);
        run(&mut chain, &mut [step(&mut sequence, &[1; 25], 4)]);
    }
    let layer = |rows| chain.costs().layers(1, rows);
    // a little less is believed with every other pass
    assert!((985.0..=990.0).contains(&(layer(12) * 4e9)));
    assert!(chain.costs().head(1) > 0.0);
    // no draft is verified among more rows than a batch gives logits of
    assert!((985.0..=990.0).contains(&(layer(20) * 4e9)));
}

#[test]
fn a_long_prompt_is_batches_and_a_rest_is_a_pass() {
    let mut chain = chain(2);
    let mut sequences = [0, 1].map(|_| chain.open(KvFill::Defer).unwrap());
    let [first, second] = &mut sequences;
    let mut steps = [step(first, &[2; 60], 4), step(second, &[1], 4)];
    steps[0].logits = LogitsRequest::Tokens(2);
    run(&mut chain, &mut steps);
    assert_eq!(batches(&chain), [40, 21]);
    assert!(chain.device().passes.is_empty());
    assert!((0..4).all(|layer| first.kv().filled(layer) == 60));
    // exits that wait come before, and a step that ends before the last layer is no batch
    run(&mut chain, &mut [step(second, &[1], 2)]);
    run(&mut chain, &mut [step(second, &[3; 29], 4)]);
    run(&mut chain, &mut [step(second, &[3; 30], 2)]);
    assert_eq!(batches(&chain)[2..], [29]);
    assert_eq!(chain.device().passes, [1, 1, 8, 8, 8, 6]);
    // a batch gives few logits
    first.truncate(0);
    let mut scored = step(first, &[4; 39], 4);
    scored.logits = LogitsRequest::Rows(25);
    run(&mut chain, &mut [scored]);
    assert_eq!(
        (&batches(&chain)[3..], &chain.device().passes[6..]),
        (&[34][..], &[5][..])
    );
}
