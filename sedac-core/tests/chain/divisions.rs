//! Attention divides a sequence's keys by the position of the row, and rows of a sequence share a pass
//! only where that gives the same: on one side of each power of two from 1024 on.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use sedac_core::Result;
use sedac_core::backend::cuda::{ChainDevice, CudaChain, PassOutcome, PassPlan};
use sedac_core::backend::{Ahead, Backend, LogitsRequest, SequenceStep};
use sedac_core::interrupt::Interrupt;
use sedac_core::kv::KvFill;
use sedac_core::policy::Condition;
use sedac_core::sequence::Sequence;

const LAYERS: usize = 4;

/// The positions of each pass, and how many of its first rows had waited.
type Passes = Arc<Mutex<Vec<(Range<usize>, usize)>>>;

/// A device that computes nothing, and notes passes, each of one sequence.
struct Recorder(Passes);

impl ChainDevice for Recorder {
    fn vocabulary(&self) -> usize {
        10
    }

    fn probes(&self) -> &[usize] {
        &[]
    }

    fn exit_heads(&self) -> &[usize] {
        &[]
    }

    fn write_conditions(&mut self, _: usize, _: &[Condition]) -> Result<u64> {
        unreachable!("no rule")
    }

    fn run(&mut self, pass: &PassPlan) -> Result<PassOutcome> {
        let [sequence] = pass.sequences[..] else {
            panic!("one sequence")
        };
        let first = pass.rows[0].position as usize;
        let positions = pass.rows.iter().map(|row| row.position as usize);
        assert!(positions.eq(first..first + pass.rows.len()));
        let waited = pass.rows.iter().filter(|row| row.token < 0).count();
        let mut passes = self.0.lock().unwrap();
        passes.push((first..first + pass.rows.len(), waited));
        let mut outcome = PassOutcome {
            steps: 1,
            ..PassOutcome::default()
        };
        (outcome.sequence[0].depth, outcome.sequence[0].criterion) = (sequence.max_depth, -1);
        outcome.row.iter_mut().for_each(|row| row.finite = 1);
        Ok(outcome)
    }

    fn logits(&mut self, _: Range<usize>) -> Result<Vec<f32>> {
        unreachable!("tokens are enough")
    }

    fn reserve(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn copy(&mut self, _: usize, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn clear(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
}

fn step(chain: &mut CudaChain<Recorder>, sequence: &mut Sequence, tokens: usize, depth: usize) {
    let tokens = vec![1; tokens];
    let step = SequenceStep {
        sequence,
        logits: LogitsRequest::Tokens(tokens.len()),
        tokens: &tokens,
        rule: None,
        max_depth: depth,
        ahead: Ahead::default(),
        next_draft: None,
    };
    chain.step(&mut [step], &Interrupt::default()).unwrap();
}

/// The passes of steps of so many tokens, each to a depth.
fn passes(steps: &[(usize, usize)]) -> Vec<(Range<usize>, usize)> {
    let passes = Passes::default();
    let mut chain = CudaChain::new(Recorder(passes.clone()), LAYERS, &[2], 4096, 1);
    let mut sequence = chain.open(KvFill::Defer).unwrap();
    for &(tokens, depth) in steps {
        passes.lock().unwrap().clear();
        step(&mut chain, &mut sequence, tokens, depth);
    }
    passes.lock().unwrap().clone()
}

#[test]
fn passes_end_before_a_position_from_which_keys_are_divided_anew() {
    assert_eq!(
        passes(&[(1021, LAYERS), (5, LAYERS)]),
        [(1021..1024, 0), (1024..1026, 0)]
    );
    assert_eq!(passes(&[(1024, LAYERS), (5, LAYERS)]), [(1024..1029, 0)]);
    assert_eq!(passes(&[(509, LAYERS), (5, LAYERS)]), [(509..514, 0)]);
    let all = passes(&[(2100, LAYERS)]);
    assert!(all.iter().flat_map(|(rows, _)| rows.clone()).eq(0..2100));
    for (rows, _) in all {
        let begins = |position: &usize| *position >= 1024 && position.is_power_of_two();
        assert_eq!(rows.clone().skip(1).find(begins), None, "{rows:?}");
    }
}

#[test]
fn so_do_passes_of_rows_that_waited() {
    // three tokens that stopped early wait when two more come
    let stopped = [(2046, LAYERS), (1, 2), (1, 2), (1, 2), (2, LAYERS)];
    assert_eq!(passes(&stopped), [(2046..2048, 2), (2048..2051, 1)]);
    let more = [(2046, LAYERS), (1, 2), (1, 2), (1, 2), (10, LAYERS)];
    assert_eq!(
        passes(&more),
        [
            (2046..2048, 2),
            (2048..2049, 1),
            (2049..2057, 0),
            (2057..2059, 0)
        ]
    );
}
