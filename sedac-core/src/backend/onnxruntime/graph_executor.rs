//! ONNX Runtime's sessions over memory of a device: the executor of a bundle's graphs for GPUs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::CudaStream;
use ort::environment::Environment;
use ort::ep::{CUDA, ExecutionProvider};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::Tensor;

use super::runtime::{
    Memory, Provider, Side, bind_input, bind_memory, binding, device_session, environment,
    provider_error, run_with, tensor, write,
};
use crate::backend::tensorrt::{Bound, Executor};
use crate::bundle::Bundle;
use crate::error::{Error, Result};

/// What the graphs take from the host: the positions that their caches hold. Attention plans its
/// work by it, and reads the length of the sequence from the device, so that captured work stays
/// right as the sequence grows.
const TOTAL: &str = "total_sequence_length";

/// Without this a run ends by waiting for the device, which a capture does not allow.
const NO_WAITING: &str = "disable_synchronize_execution_providers";

/// Where the graphs are computed.
#[derive(Debug, Clone)]
pub enum GraphDevice {
    /// A GPU, by the CUDA provider on this stream.
    Cuda(Arc<CudaStream>),
    /// The host, for rehearsals where there is no GPU.
    Host,
}

impl GraphDevice {
    /// What tensors are on it.
    pub(super) fn memory_info(&self) -> ort::Result<MemoryInfo<'static>> {
        let device = match self {
            Self::Cuda(_) => AllocationDevice::CUDA,
            Self::Host => AllocationDevice::CPU,
        };
        MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default)
    }
}

/// Runs a bundle's graphs for GPUs.
pub struct GraphExecutor {
    /// First, for they go first: their stream is the device's.
    sessions: Mutex<HashMap<PathBuf, Session>>,
    device: GraphDevice,
    bundle: Bundle,
    environment: Environment,
    options: RunOptions,
    total: Tensor<i32>,
}

impl GraphExecutor {
    /// Run the graphs of `bundle` on `device` with the ONNX Runtime library at `library`.
    ///
    /// # Errors
    /// [`Error::Library`] when ONNX Runtime cannot be loaded, [`Error::Device`] when it is one
    /// without the CUDA provider.
    pub fn new(
        bundle: &Bundle,
        device: GraphDevice,
        library: &Path,
        threads: usize,
    ) -> Result<Self> {
        let environment = environment(library, threads)?;
        let on_gpu = matches!(device, GraphDevice::Cuda(_));
        if on_gpu && !CUDA::is_available().map_err(provider_error)? {
            return Err(Error::Device {
                what: library.display().to_string(),
                reason: "this ONNX Runtime has no CUDA provider; pip install --force-reinstall \
                         'sedac-runtime[gpu]', or use --device cpu"
                    .into(),
            });
        }
        let options = || {
            let mut options = RunOptions::new()?;
            options.set(NO_WAITING, "1")?;
            Ok(options)
        };
        let mut total = tensor(&[])?;
        write(&mut total, &[bundle.manifest.max_cache_length as i32]);
        Ok(Self {
            bundle: bundle.clone(),
            device,
            options: options().map_err(provider_error)?,
            environment,
            total,
            sessions: Mutex::default(),
        })
    }

    fn open(&self, file: &Path) -> Result<Session> {
        let provider = match &self.device {
            GraphDevice::Cuda(stream) => Provider::Cuda(stream.cu_stream() as u64),
            GraphDevice::Host => Provider::Cpu,
        };
        // SAFETY: `self` keeps the stream, and drops it after the sessions.
        unsafe { device_session(&self.environment, &self.bundle, file, provider) }
    }

    /// The tensors of `session`, all but [`TOTAL`] in the memory of `tensors`.
    ///
    /// # Safety
    /// Each tensor has its `bytes` of memory on the device until the work of the binding is done.
    unsafe fn bind(&self, session: &Session, tensors: &[Bound]) -> Result<IoBinding> {
        let mut bound = binding(session)?;
        let info = self.device.memory_info().map_err(provider_error)?;
        let inputs = session.inputs().iter().map(|input| (Side::Input, input));
        let outputs = session.outputs().iter();
        let outputs = outputs.map(|output| (Side::Output, output));
        for (side, value) in inputs.chain(outputs) {
            let name = value.name();
            if name == TOTAL {
                bind_input(&mut bound, name, &self.total)?;
                continue;
            }
            let known = tensors.iter().find(|tensor| tensor.name == name);
            let Some(tensor) = known else {
                let what = format!("the graph has a tensor {name}, which this runtime lacks");
                return Err(wrong(what));
            };
            let memory = Memory {
                info: &info,
                address: tensor.address,
                shape: &tensor.shape,
                bytes: tensor.bytes,
            };
            // SAFETY: what the caller promises.
            unsafe { bind_memory(&mut bound, side, value, &memory)? };
        }
        Ok(bound)
    }
}

// SAFETY: `bind_memory` compares the bytes of each of a session's tensors with those of the tensor
// it is bound to, and ONNX Runtime compares the shapes in every run. Its kernels read and write the
// tensors bound, and memory of its own sessions, which are kept.
unsafe impl Executor for GraphExecutor {
    unsafe fn enqueue(
        &self,
        plan: &Path,
        tensors: &[Bound],
        stream: u64,
        _replayed: bool,
    ) -> Result<()> {
        if let GraphDevice::Cuda(own) = &self.device {
            assert_eq!(stream, own.cu_stream() as u64, "sessions have one stream");
        }
        let file = plan.strip_prefix(self.bundle.gate.root()).unwrap_or(plan);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if !sessions.contains_key(file) {
            sessions.insert(file.to_owned(), self.open(file)?);
        }
        let session = sessions.get_mut(file).expect("inserted above");
        // SAFETY: what the caller promises.
        let bound = unsafe { self.bind(session, tensors)? };
        run_with(session, &bound, Some(&self.options), || {
            format!("{}", file.display())
        })
    }
}

fn wrong(reason: String) -> Error {
    Error::Device {
        what: "ONNX Runtime's graphs for GPUs".into(),
        reason: format!("{reason}; build the bundle again"),
    }
}
