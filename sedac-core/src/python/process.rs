//! What a forked process may not touch: it has no copy of the threads that run engines, and the
//! locks that they held stay held in it for ever.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{process, ptr};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::error::EngineError;

/// The process that uses the core; 0 before any does.
static USER: AtomicU32 = AtomicU32::new(0);

/// # Errors
/// EngineError in a process forked from one that came here before.
pub(super) fn check() -> PyResult<()> {
    let _ = USER.compare_exchange(0, process::id(), Ordering::Relaxed, Ordering::Relaxed);
    if is_forked() {
        return Err(EngineError::new_err(
            "this process was forked from one that uses sedac_runtime, whose threads it lacks; \
             start it with multiprocessing's method spawn, and load the bundle in it",
        ));
    }
    Ok(())
}

fn is_forked() -> bool {
    ![0, process::id()].contains(&USER.load(Ordering::Relaxed))
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

/// Have forked processes end: ONNX Runtime's destructors would wait in them for its threads.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let hooks = PyDict::new(py);
    hooks.set_item("after_in_child", wrap_pyfunction!(forked, module)?)?;
    py.import("os")?
        .call_method("register_at_fork", (), Some(&hooks))?;
    Ok(())
}

#[pyfunction]
fn forked() {
    #[cfg(target_env = "gnu")]
    if is_forked() {
        // SAFETY: glibc's on_exit takes any function of this signature and hands the argument,
        // which `leave` does not look at, on to it.
        unsafe { on_exit(leave, ptr::null_mut()) };
    }
}

/// End the process with `status`. What runs at exit runs newest first, so this is before what the
/// libraries had registered when the process was forked.
#[cfg(target_env = "gnu")]
extern "C" fn leave(status: c_int, _: *mut c_void) {
    // SAFETY: both may be called at exit; a null pointer stands for all open streams.
    unsafe {
        fflush(ptr::null_mut());
        _exit(status)
    }
}

#[cfg(target_env = "gnu")]
unsafe extern "C" {
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
    fn fflush(stream: *mut c_void) -> c_int;
    fn _exit(status: c_int) -> !;
}
