//! The thread that steps a scheduler: when it does, what it keeps, and how it ends.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::scheduled::{Outcome, add, alone, note, request, settings};
use super::toy::{Decides, chain};
use sedac_core::chain::Chain;
use sedac_core::interrupt::Interrupt;
use sedac_core::sampler::LogitsProcessing;
use sedac_core::scheduler::{Progress, Scheduler, SchedulerSettings, StepThread};

/// What comes at all comes within this time.
const LONG: Duration = Duration::from_secs(20);
/// What does not come within this time is not expected to.
const SHORT: Duration = Duration::from_millis(100);

fn toy() -> Chain {
    chain(Decides::Host, &[1, 2, 1], 256, 0.1).0
}

/// A scheduler whose steps a thread runs.
struct Stepped {
    scheduler: Arc<Scheduler>,
    thread: StepThread,
    /// Once for each time that there is something to take; disconnected once the thread has ended.
    ready: Receiver<()>,
    steps: Arc<AtomicUsize>,
}

impl Deref for Stepped {
    type Target = Scheduler;

    fn deref(&self) -> &Scheduler {
        &self.scheduler
    }
}

impl Stepped {
    fn new(settings: SchedulerSettings) -> Self {
        Self::with(settings, || {})
    }

    /// `begin` is called at the beginning of each step.
    fn with(settings: SchedulerSettings, begin: impl Fn() + Send + 'static) -> Self {
        Self::over(toy(), settings, begin)
    }

    fn over(
        mut chain: Chain,
        settings: SchedulerSettings,
        begin: impl Fn() + Send + 'static,
    ) -> Self {
        let scheduler = Arc::new(Scheduler::new(&mut chain, settings).unwrap());
        let (signal, ready) = channel();
        let steps = Arc::<AtomicUsize>::default();
        let counted = steps.clone();
        let step = move |scheduler: &Scheduler| {
            counted.fetch_add(1, Ordering::SeqCst);
            begin();
            scheduler.step(&mut chain, &Interrupt::default())
        };
        let signal = move || signal.send(()).unwrap();
        let thread = StepThread::start(scheduler.clone(), step, signal).unwrap();
        Self {
            scheduler,
            thread,
            ready,
            steps,
        }
    }

    /// A thread of which each step waits for a message.
    fn held(settings: SchedulerSettings) -> (Self, Sender<()>) {
        let (go, held) = channel();
        let stepped = Self::with(settings, move || held.recv_timeout(LONG).unwrap());
        (stepped, go)
    }

    fn take(&self) -> Vec<Progress> {
        self.ready.recv_timeout(LONG).unwrap();
        let progress = self.thread.take().unwrap();
        assert!(!progress.is_empty(), "there is something to take");
        progress
    }

    /// Take until `count` texts have ended.
    fn finish(&self, count: usize) -> BTreeMap<u64, Outcome> {
        let mut outcomes = BTreeMap::new();
        while outcomes
            .values()
            .filter(|o: &&Outcome| o.end.is_some())
            .count()
            < count
        {
            note(&mut outcomes, self.take());
        }
        outcomes
    }

    fn steps(&self) -> usize {
        self.steps.load(Ordering::SeqCst)
    }

    /// Wait until there are no more steps. Returns their number.
    fn rest(&self) -> usize {
        let end = Instant::now() + LONG;
        loop {
            let steps = self.steps();
            sleep(SHORT);
            if steps == self.steps() {
                return steps;
            }
            assert!(Instant::now() < end, "it does not rest");
        }
    }

    fn assert_ends(&self) {
        assert_eq!(
            self.ready.recv_timeout(LONG),
            Err(RecvTimeoutError::Disconnected)
        );
    }
}

fn constrained(stepped: &Stepped, tokens: usize) -> u64 {
    let processing = LogitsProcessing {
        constrained: true,
        ..LogitsProcessing::default()
    };
    stepped
        .add(&request(vec![1, 2], tokens), processing)
        .unwrap()
}

#[test]
fn it_steps_while_there_is_something_to_do() {
    let stepped = Stepped::new(settings(2, 8));
    assert_eq!(stepped.rest(), 0);
    for prompt in [vec![1, 2], vec![3]] {
        let request = request(prompt, 10);
        let number = add(&stepped, &request);
        let (tokens, reason) = alone(&mut toy(), &request);
        let outcome = &stepped.finish(1)[&number];
        assert_eq!(
            (&outcome.tokens, &outcome.end),
            (&tokens, &Some(Ok(reason)))
        );
        let steps = stepped.rest();
        assert_eq!(stepped.rest(), steps);
    }
}

#[test]
fn a_text_whose_slot_others_have_asks_again_without_spinning() {
    let mut chain = toy();
    // there are two slots
    let others = [(); 2].map(|()| Scheduler::new(&mut chain, settings(1, 8)).unwrap());
    for other in &others {
        add(other, &request(vec![1, 2], 10));
        other.step(&mut chain, &Interrupt::default());
    }
    let stepped = Stepped::over(chain, settings(1, 8), || {});
    let begun = Instant::now();
    let number = add(&stepped, &request(vec![3], 10));
    while stepped.steps() < 4 {
        assert!(begun.elapsed() < LONG, "it does not ask again");
        sleep(SHORT / 10);
    }
    let steps = stepped.steps();
    let most = begun.elapsed().as_millis() as usize / 4 + 4;
    assert!(steps <= most, "{steps} steps of {most}");
    drop(others);
    assert_eq!(stepped.finish(1)[&number].tokens.len(), 10);
}

/// Caches that do not suffice for all: texts wait, and give theirs up.
#[test]
fn every_text_ends_however_little_room_there_is() {
    let scarce = SchedulerSettings {
        cache_tokens: Some(60),
        ..settings(4, 4)
    };
    let stepped = Stepped::new(scarce);
    let requests: Vec<_> = (0..12).map(|n| request(vec![n % 5, 2], 30)).collect();
    let numbers: Vec<_> = requests.iter().map(|each| add(&stepped, each)).collect();
    let outcomes = stepped.finish(requests.len());
    for (number, request) in numbers.iter().zip(&requests) {
        assert_eq!(outcomes[number].tokens, alone(&mut toy(), request).0);
    }
    assert!(stepped.statistics().preemptions > 0);
}

#[test]
fn a_text_that_waits_for_its_mask_neither_spins_nor_stops_others() {
    let stepped = Stepped::new(settings(2, 8));
    let waiting = constrained(&stepped, 2);
    assert!(stepped.rest() < 4);
    let other = add(&stepped, &request(vec![3], 10));
    assert_eq!(stepped.finish(1)[&other].tokens.len(), 10);
    stepped.rest();
    for token in [3, 4] {
        stepped.allow([(waiting, vec![1 << token])]).unwrap();
        let progress = stepped.take();
        let ids = progress.iter().flat_map(|each| &each.tokens);
        assert_eq!(ids.map(|token| token.id).collect::<Vec<_>>(), [token]);
    }
}

#[test]
fn a_text_that_waits_for_its_mask_is_cancelled_at_once() {
    let stepped = Stepped::new(settings(1, 8));
    let waiting = constrained(&stepped, 2);
    stepped.rest();
    assert_eq!(stepped.statistics().running, 1);
    stepped.cancel(waiting);
    stepped.rest();
    assert_eq!(stepped.statistics().running, 0);
}

#[test]
fn masks_of_one_call_are_there_for_the_same_step() {
    let stepped = Stepped::new(settings(4, 64));
    let numbers = [(); 4].map(|()| constrained(&stepped, 2));
    stepped.rest();
    for _ in 0..2 {
        let steps = stepped.steps();
        stepped
            .allow(numbers.map(|number| (number, vec![1 << 3])))
            .unwrap();
        assert_eq!(stepped.take().len(), 4);
        assert!(
            stepped.rest() <= steps + 2,
            "one step, and one that finds nothing"
        );
    }
}

#[test]
fn what_is_cancelled_is_in_no_later_step() {
    let (stepped, go) = Stepped::held(settings(2, 8));
    let [cancelled, other] = [1, 2].map(|n| add(&stepped, &request(vec![n], 50)));
    for _ in 0..2 {
        go.send(()).unwrap();
        stepped.take();
    }
    stepped.cancel(cancelled);
    for _ in 0..2 {
        go.send(()).unwrap();
        assert!(stepped.take().iter().all(|each| each.sequence == other));
    }
    stepped.cancel(other);
    go.send(()).unwrap();
    stepped.rest();
    let statistics = stepped.statistics();
    assert_eq!((statistics.running, statistics.waiting), (0, 0));
}

#[test]
fn it_waits_for_who_does_not_take_and_keeps_the_order() {
    let stepped = Stepped::new(settings(1, 8));
    let request = request(vec![1, 2], 60);
    let number = add(&stepped, &request);
    assert!((2..=20).contains(&stepped.rest()));
    let outcome = stepped.finish(1).remove(&number).unwrap();
    assert_eq!(outcome.tokens, alone(&mut toy(), &request).0);
}

#[test]
fn times_are_those_of_the_steps_and_not_of_taking() {
    const STEP: Duration = Duration::from_millis(20);
    let stepped = Stepped::with(settings(1, 8), || sleep(STEP));
    let added = Instant::now();
    add(&stepped, &request(vec![1], 5));
    stepped.rest();
    let progress = stepped.take();
    assert_eq!(progress.len(), 5, "taken at once");
    assert!(progress.iter().all(|each| each.waited >= STEP));
    let total: Duration = progress.iter().map(|each| each.waited).sum();
    assert!(total <= added.elapsed());
}

#[test]
fn it_ends_when_told_whatever_it_does() {
    let idle = Stepped::new(settings(1, 8));
    idle.rest();
    idle.thread.stop();
    idle.assert_ends();

    let waits_for_a_mask = Stepped::new(settings(1, 8));
    constrained(&waits_for_a_mask, 2);
    waits_for_a_mask.rest();
    waits_for_a_mask.thread.stop();
    waits_for_a_mask.assert_ends();

    let full = Stepped::new(settings(1, 8));
    add(&full, &request(vec![1], 60));
    let steps = full.rest();
    full.thread.stop();
    full.ready.recv_timeout(LONG).unwrap();
    full.assert_ends();
    assert_eq!(full.steps(), steps);
    assert_eq!(
        full.thread.take().unwrap().len(),
        steps,
        "what it gave is still there"
    );
    full.thread.stop();
}

#[test]
fn it_ends_with_what_owns_it() {
    let Stepped { thread, ready, .. } = Stepped::new(settings(1, 8));
    drop(thread);
    assert_eq!(
        ready.recv_timeout(LONG),
        Err(RecvTimeoutError::Disconnected)
    );
}

#[test]
fn a_panic_is_reported_after_what_came_before_it() {
    let count = AtomicUsize::new(0);
    let stepped = Stepped::with(settings(1, 8), move || {
        let count = count.fetch_add(1, Ordering::SeqCst);
        assert!(count < 3, "step {count} is broken");
    });
    add(&stepped, &request(vec![1], 50));
    for _ in 0..2 {
        stepped.ready.recv_timeout(LONG).unwrap();
    }
    stepped.assert_ends();
    assert_eq!(stepped.thread.take().unwrap().len(), 3);
    assert_eq!(stepped.thread.take().unwrap_err(), "step 3 is broken");
}
