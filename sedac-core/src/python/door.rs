//! The one door for long calls: work runs on a separate thread without the GIL, while the
//! calling thread listens for Ctrl-C.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::process;
use crate::interrupt::Interrupt;

/// How often signals are looked at, well under the 200 ms within which Ctrl-C must act.
pub(super) const POLL: Duration = Duration::from_millis(20);

/// How long an interrupted worker is waited for; it notices between engines.
const PATIENCE: Duration = Duration::from_millis(60);

/// What a worker sends.
pub(super) type Inbox<T> = Mutex<Receiver<T>>;

/// The next value from a worker, None when it ended.
///
/// # Errors
/// KeyboardInterrupt on Ctrl-C, after asking the worker to stop through `interrupt`.
pub(super) fn receive<T: Send>(
    py: Python<'_>,
    inbox: &Inbox<T>,
    interrupt: &Interrupt,
) -> PyResult<Option<T>> {
    loop {
        match py.detach(|| wait(inbox, POLL)) {
            Ok(value) => return Ok(Some(value)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Err(signal) = py.check_signals() {
            interrupt.raise();
            py.detach(|| drain(inbox));
            return Err(signal);
        }
    }
}

/// Run `work` to its end.
///
/// # Errors
/// What `work` reports, KeyboardInterrupt on Ctrl-C, RuntimeError if it panics, EngineError in a
/// forked process.
pub(super) fn run<T, F>(py: Python<'_>, interrupt: &Interrupt, work: F) -> PyResult<T>
where
    T: Send + 'static,
    F: FnOnce() -> crate::Result<T> + Send + 'static,
{
    process::check()?;
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(work()));
    match receive(py, &Mutex::new(receiver), interrupt)? {
        Some(result) => Ok(result?),
        None => Err(PyRuntimeError::new_err("the worker thread panicked")),
    }
}

fn wait<T>(inbox: &Inbox<T>, timeout: Duration) -> Result<T, RecvTimeoutError> {
    match inbox.lock() {
        Ok(receiver) => receiver.recv_timeout(timeout),
        Err(_) => Err(RecvTimeoutError::Disconnected),
    }
}

fn drain<T>(inbox: &Inbox<T>) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && !matches!(wait(inbox, POLL), Err(RecvTimeoutError::Disconnected))
    {
    }
}
