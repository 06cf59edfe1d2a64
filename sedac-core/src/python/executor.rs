//! TensorRT's Python package as the core's executor.

use std::path::Path;

use pyo3::prelude::*;

use super::spellings::PlanDevice;
use crate::backend::tensorrt::{Bound as BoundTensor, Executor};
use crate::bundle::PlanTarget;
use crate::error::{Error, Result};

/// A tensor of a plan: its name, the address of its first element, its shape, and the bytes of all
/// its elements.
#[pyclass(frozen, get_all, name = "PlanTensor")]
#[derive(Debug)]
pub(super) struct PyPlanTensor {
    name: String,
    address: u64,
    shape: Vec<usize>,
    bytes: usize,
}

#[pymethods]
impl PyPlanTensor {
    #[new]
    fn new(name: String, address: u64, shape: Vec<usize>, bytes: usize) -> Self {
        Self {
            name,
            address,
            shape,
            bytes,
        }
    }
}

impl From<&BoundTensor> for PyPlanTensor {
    fn from(tensor: &BoundTensor) -> Self {
        let BoundTensor {
            name,
            address,
            shape,
            bytes,
        } = tensor.clone();
        Self::new(name, address, shape, bytes)
    }
}

/// Runs the plans of `target` over the memory of `device`, as its attributes of these names say.
/// Called with (plan, tensors, stream, replayed), it puts a plan on a stream.
pub(super) struct PythonExecutor {
    pub(super) target: PlanTarget,
    pub(super) device: PlanDevice,
    call: Py<PyAny>,
}

impl<'py> FromPyObject<'_, 'py> for PythonExecutor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self {
            target: object.getattr("target")?.extract()?,
            device: object.getattr("device")?.extract()?,
            call: object.to_owned().unbind(),
        })
    }
}

// SAFETY: `sedac_runtime.tensorrt.PlanExecutor` compares shape and bytes of each of a plan's tensors
// with these before the plan runs. Whoever passes a callable of their own answers for it as for any
// Python that is given addresses (ctypes).
unsafe impl Executor for PythonExecutor {
    unsafe fn enqueue(
        &self,
        plan: &Path,
        tensors: &[BoundTensor],
        stream: u64,
        replayed: bool,
    ) -> Result<()> {
        let tensors: Vec<_> = tensors.iter().map(PyPlanTensor::from).collect();
        Python::attach(|py| {
            let called = self.call.call1(py, (plan, tensors, stream, replayed));
            called.map(drop).map_err(|error| Error::Device {
                what: plan.display().to_string(),
                reason: error.value(py).to_string(),
            })
        })
    }
}
