//! Steps on a thread of their own.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::{Progress, Scheduler};

/// Steps whose progress may wait to be taken; then the next step waits, too.
const MOST_AHEAD: usize = 16;

/// A thread that steps a scheduler while there is something to do, and keeps what that gives until it
/// is taken.
pub struct StepThread {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    scheduler: Arc<Scheduler>,
    results: Mutex<Results>,
    /// Results have been taken.
    taken: Condvar,
    is_stopping: AtomicBool,
}

/// What was not taken.
#[derive(Default)]
struct Results {
    progress: Vec<Progress>,
    /// The number of steps that gave it.
    steps: usize,
    /// What a step that panicked said.
    panic: Option<String>,
}

impl StepThread {
    /// Begin to call `step`, which steps `scheduler` once. `ready` is called, on the thread, whenever
    /// there is something to [take](Self::take), once for each time.
    ///
    /// # Errors
    /// Where the system has no thread.
    pub fn start(
        scheduler: Arc<Scheduler>,
        mut step: impl FnMut(&Scheduler) -> Vec<Progress> + Send + 'static,
        ready: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            scheduler,
            results: Mutex::default(),
            taken: Condvar::new(),
            is_stopping: AtomicBool::new(false),
        });
        let thread = thread::Builder::new().name("sedac-steps".into());
        let thread = thread.spawn({
            let shared = shared.clone();
            move || shared.run(&mut step, &ready)
        })?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// What steps have given since the last time, in their order, without waiting for any.
    ///
    /// # Errors
    /// What a step that panicked said, once all before it was taken. It was the last one.
    pub fn take(&self) -> Result<Vec<Progress>, String> {
        let mut results = self.shared.results();
        let progress = std::mem::take(&mut results.progress);
        results.steps = 0;
        self.shared.taken.notify_one();
        match results.panic.take_if(|_| progress.is_empty()) {
            Some(panic) => Err(panic),
            None => Ok(progress),
        }
    }

    /// End the thread after its step, and wait for that.
    pub fn stop(&self) {
        self.shared.stop();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // it catches what steps panic with
            let _ = thread.join();
        }
    }
}

impl Drop for StepThread {
    /// The thread ends after its step, which is not waited for.
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn run(&self, step: &mut dyn FnMut(&Scheduler) -> Vec<Progress>, ready: &dyn Fn()) {
        let steps = AssertUnwindSafe(|| {
            while self.wait() {
                self.put(step(&self.scheduler), ready);
            }
        });
        if let Err(panic) = catch_unwind(steps) {
            self.results().panic = Some(message(&*panic));
            ready();
        }
    }

    /// Wait until the next step has room for its results and something to do. False when it is not to
    /// come.
    fn wait(&self) -> bool {
        let is_stopping = || self.is_stopping.load(Ordering::Relaxed);
        let is_full = |results: &mut Results| results.steps == MOST_AHEAD && !is_stopping();
        drop(self.taken.wait_while(self.results(), is_full));
        self.scheduler.wait(is_stopping);
        !is_stopping()
    }

    fn put(&self, progress: Vec<Progress>, ready: &dyn Fn()) {
        if progress.is_empty() {
            return;
        }
        let mut results = self.results();
        results.steps += 1;
        results.progress.extend(progress);
        let is_first = results.steps == 1;
        drop(results);
        if is_first {
            ready();
        }
    }

    fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        // not between a look at the flag and the wait that follows it
        drop(self.results());
        self.taken.notify_one();
        self.scheduler.wake();
    }

    fn results(&self) -> MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a step panicked".into())
}
