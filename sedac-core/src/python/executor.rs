//! TensorRT's Python package as the core's executor.

use std::path::Path;

use pyo3::prelude::*;

use crate::backend::tensorrt::{Bound, Executor};
use crate::error::{Error, Result};

/// A callable that puts a plan on a stream: (path, [(tensor, address, shape, bytes)], stream,
/// replayed) -> None.
pub(super) struct PythonExecutor(pub(super) Py<PyAny>);

// SAFETY: `sedac_runtime.tensorrt.PlanExecutor` compares shape and bytes of each of a plan's tensors
// with these before the plan runs. Whoever passes a callable of their own answers for it as for any
// Python that is given addresses (ctypes).
unsafe impl Executor for PythonExecutor {
    unsafe fn enqueue(
        &self,
        plan: &Path,
        tensors: &[Bound],
        stream: u64,
        replayed: bool,
    ) -> Result<()> {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|tensor| (&*tensor.name, tensor.address, &*tensor.shape, tensor.bytes))
            .collect();
        Python::attach(|py| {
            let called = self.0.call1(py, (plan, tensors, stream, replayed));
            called.map(drop).map_err(|error| Error::Device {
                what: plan.display().to_string(),
                reason: error.value(py).to_string(),
            })
        })
    }
}
