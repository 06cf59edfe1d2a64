//! Steps on a thread that does without the GIL.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::process::ProcessLocal;
use super::scheduler::PyProgress;
use super::turns::Turns;
use crate::interrupt::Interrupt;
use crate::scheduler::{Scheduler, StepThread};

/// Steps a scheduler, and keeps what that gives until it is taken.
#[pyclass(frozen, name = "StepThread")]
pub(super) struct PyStepThread {
    thread: ProcessLocal<StepThread>,
    /// Has a byte for each time that there is something to take.
    ready: UnixStream,
}

impl PyStepThread {
    pub(super) fn start(scheduler: Arc<Scheduler>, turns: Arc<Turns>) -> PyResult<Self> {
        let (ready, signal) = UnixStream::pair()?;
        ready.set_nonblocking(true)?;
        let step =
            move |scheduler: &Scheduler| scheduler.step(&mut turns.take(), &Interrupt::default());
        let thread = StepThread::start(scheduler, step, move || {
            // fails where nobody is left to read it
            let _ = (&signal).write(&[0]);
        })?;
        Ok(Self {
            thread: ProcessLocal::new(thread),
            ready,
        })
    }
}

#[pymethods]
impl PyStepThread {
    /// Can be read while there is something to take, and once the thread has ended.
    fn fileno(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    /// What steps have given since the last time.
    fn take(&self, py: Python<'_>) -> PyResult<Vec<PyProgress>> {
        let thread = self.thread.get()?;
        match (&self.ready).read(&mut [0]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
            _ => {}
        }
        let progress = thread.take().map_err(PyRuntimeError::new_err)?;
        let progress = progress.into_iter();
        progress
            .map(|progress| PyProgress::new(py, progress))
            .collect()
    }

    /// End the thread after its step.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let thread = self.thread.get()?;
        py.detach(|| thread.stop());
        Ok(())
    }
}
