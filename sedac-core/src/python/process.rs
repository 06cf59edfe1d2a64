//! What a forked process may not touch: it has no copy of the threads that run engines, and the
//! locks that they held stay held in it for ever.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pyo3::prelude::*;

use super::error::EngineError;

/// The process that first came here; 0 before.
static FIRST: AtomicU32 = AtomicU32::new(0);

/// # Errors
/// EngineError in a process forked from one that came here before.
pub(super) fn check() -> PyResult<()> {
    if is_forked() {
        return Err(EngineError::new_err(
            "this process was forked from one that uses sedac_runtime, whose threads it lacks; \
             start it with multiprocessing's method spawn, and load the bundle in it",
        ));
    }
    Ok(())
}

fn is_forked() -> bool {
    let id = process::id();
    let first = FIRST.compare_exchange(0, id, Ordering::Relaxed, Ordering::Relaxed);
    first.is_err_and(|first| first != id)
}

/// A value for the process that made it. One forked from it neither uses nor drops the value.
pub(super) struct ProcessLocal<T>(Arc<T>);

impl<T> ProcessLocal<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Arc::new(value))
    }

    /// # Errors
    /// As [`check`].
    pub(super) fn get(&self) -> PyResult<&Arc<T>> {
        check()?;
        Ok(&self.0)
    }
}

impl<T> Drop for ProcessLocal<T> {
    fn drop(&mut self) {
        if is_forked() {
            std::mem::forget(self.0.clone());
        }
    }
}
