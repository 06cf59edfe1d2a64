//! What a scheduler's steps prefill where the backend has batches.

use super::scheduled::{add, request};
use super::toy::{Caches, ToyKernel, chain_over_kernel};
use sedac_core::interrupt::Interrupt;
use sedac_core::scheduler::{Scheduler, SchedulerSettings};

#[test]
fn a_step_prefills_a_batch() {
    let kernel = ToyKernel::new(&[1; 4], 256, 5, &Caches::default());
    let batches = kernel.batches.clone();
    let mut chain = chain_over_kernel(kernel, &[1, 2, 3, 4], 0.1);
    let settings = SchedulerSettings {
        max_sequences: Some(4),
        cache_tokens: None,
        prefill_chunk: None,
    };
    let scheduler = Scheduler::new(&mut chain, settings).unwrap();
    for (first, length) in [(1, 60), (2, 60), (3, 10), (4, 10)] {
        add(&scheduler, &request(vec![first; length], 1));
    }
    let mut step = || {
        scheduler.step(&mut chain, &Interrupt::default());
        std::mem::take(&mut *batches.lock().unwrap())
    };
    // what is left of prompts, and short ones, share steps
    assert_eq!([step(), step(), step(), step()], [[40], [40], [40], [20]]);
    assert!(step().is_empty());
}
