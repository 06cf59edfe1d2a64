//! How many sequences a scheduler runs at once where nobody says so.

use super::scheduled::settings;
use super::toy::{CAPACITY, Caches, Decides, ToyKernel, chain, chain_over_kernel};
use sedac_core::chain::Chain;
use sedac_core::scheduler::{Scheduler, SchedulerSettings};

/// The sequences that run at once, and the cache positions of all of them.
fn usual(chain: &mut Chain) -> (usize, usize) {
    let settings = SchedulerSettings {
        max_sequences: None,
        ..settings(1, 1)
    };
    let scheduler = Scheduler::new(chain, settings).unwrap();
    (
        scheduler.max_sequences(),
        scheduler.statistics().cache_tokens,
    )
}

#[test]
fn as_many_run_as_suit_the_backend_and_fit() {
    let mut toy = chain(Decides::Host, &[1, 2, 1], 256, 0.1).0;
    assert_eq!(usual(&mut toy), (8, 8 * CAPACITY));
    // beside those of the scheduler there is a slot for a text alone, unless there is but one
    for (room, expected) in [(usize::MAX, 64), (65, 64), (64, 63), (6, 5), (1, 1), (0, 1)] {
        let mut kernel = ToyKernel::new(&[1; 4], 256, 1, &Caches::default());
        kernel.room = room;
        let mut chain = chain_over_kernel(kernel, &[1, 2, 3, 4], 0.1);
        assert_eq!(usual(&mut chain), (expected, expected * CAPACITY));
        // the slots that one scheduler made are there for the next
        assert_eq!(usual(&mut chain), (expected, expected * CAPACITY));
    }
}
