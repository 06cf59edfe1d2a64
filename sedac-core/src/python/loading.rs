//! The backends, and which of them runs a bundle.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::executor::PythonExecutor;
use super::spellings::{BackendChoice, CPU, CUDA, ONNXRUNTIME_CUDA, PlanDevice};
use crate::backend::tensorrt::{Cuda, Host, TensorRt};
use crate::backend::{Exits, GraphDevice, GraphExecutor, Layout};
use crate::bundle::{Bundle, PlanTarget, Target};
use crate::chain::Chain;
use crate::error::{Error, Result};

/// A backend that "auto" did not take, and why.
pub(super) type PassedOver = (&'static str, String);

/// What runs a loaded bundle.
#[derive(Debug, Clone, Copy)]
pub(super) enum BackendName {
    Onnxruntime,
    OnnxruntimeCuda,
    Plans(PlanTarget),
    Cuda,
}

impl BackendName {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Onnxruntime | Self::OnnxruntimeCuda => Target::Onnxruntime.name(),
            Self::Plans(target) => target.name(),
            Self::Cuda => CUDA,
        }
    }

    pub(super) fn device(self) -> &'static str {
        match self {
            Self::Onnxruntime => CPU,
            Self::OnnxruntimeCuda | Self::Plans(_) | Self::Cuda => CUDA,
        }
    }

    /// What runs instead of ONNX Runtime's engines.
    pub(super) fn others(self) -> Option<&'static str> {
        match self {
            Self::Onnxruntime => None,
            Self::OnnxruntimeCuda => Some("graphs for GPUs"),
            Self::Plans(_) => Some("TensorRT plans"),
            Self::Cuda => Some("CUDA kernels"),
        }
    }
}

/// ONNX Runtime, and the threads it runs with.
#[derive(Clone)]
pub(super) struct Library {
    pub(super) path: PathBuf,
    pub(super) threads: usize,
}

/// A chain, and how it was chosen.
pub(super) struct Loaded {
    pub(super) chain: Chain,
    pub(super) backend: BackendName,
    pub(super) passed_over: Vec<PassedOver>,
}

impl Loaded {
    fn new(chain: Chain, backend: BackendName) -> Self {
        Self {
            chain,
            backend,
            passed_over: Vec::new(),
        }
    }
}

/// A chain over what `choice` says, or over the plans that `executor` runs. `device` is where ONNX
/// Runtime runs the bundle's graphs for GPUs; None for its engines on the CPU. "auto" tries backends
/// of other libraries after their preparation only.
pub(super) fn load(
    bundle: &Bundle,
    library: &Library,
    choice: BackendChoice,
    device: Option<PlanDevice>,
    executor: Option<PythonExecutor>,
    preparation: Option<&Preparation>,
) -> Result<Loaded> {
    let mut loaded = match (choice, executor) {
        (BackendChoice::Auto, _) => load_first(bundle, library, preparation),
        (_, Some(executor)) => load_plans(bundle, library, executor),
        (BackendChoice::Cuda, None) => load_kernels(bundle),
        (BackendChoice::Onnxruntime, None) => match device {
            Some(device) => load_graphs(bundle, library, device),
            None => load_engines(bundle, library),
        },
    }?;
    let (backend, on_gpu) = (loaded.backend.name(), loaded.backend.device() == CUDA);
    loaded
        .chain
        .remember(bundle, backend, on_gpu, library.threads);
    Ok(loaded)
}

/// What Python does before "auto" tries a backend of another library: called with the backend's name,
/// it gives an executor of its plans, or makes ONNX Runtime's CUDA provider ready.
pub(super) struct Preparation(Py<PyAny>);

impl Preparation {
    fn executor(&self, target: PlanTarget) -> std::result::Result<PythonExecutor, String> {
        self.call(target.name(), |made| made.extract())
    }

    fn provider(&self) -> std::result::Result<(), String> {
        self.call(Target::Onnxruntime.name(), |_| Ok(()))
    }

    fn call<T>(
        &self,
        backend: &str,
        take: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>,
    ) -> std::result::Result<T, String> {
        Python::attach(|py| {
            let made = self.0.bind(py).call1((backend,));
            let taken = made.and_then(|made| take(&made));
            taken.map_err(|error| error.value(py).to_string())
        })
    }
}

impl<'py> FromPyObject<'_, 'py> for Preparation {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(object.to_owned().unbind()))
    }
}

/// A chain over the best that can run.
fn load_first(
    bundle: &Bundle,
    library: &Library,
    preparation: Option<&Preparation>,
) -> Result<Loaded> {
    let mut passed_over = Vec::new();
    let candidates = candidates(bundle, library, preparation);
    for (name, load) in candidates {
        match load() {
            Ok(loaded) => {
                return Ok(Loaded {
                    passed_over,
                    ..loaded
                });
            }
            Err(Refusal::CannotRun(reason)) => passed_over.push((name, reason)),
            Err(Refusal::Other(error)) => return Err(error),
        }
    }
    Ok(Loaded {
        passed_over,
        ..load_engines(bundle, library)?
    })
}

/// Why a backend does not run a bundle.
enum Refusal {
    /// It cannot here; another may.
    CannotRun(String),
    /// No backend could.
    Other(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        match error {
            Error::Bundle { .. }
            | Error::Device { .. }
            | Error::Engine { .. }
            | Error::Memory { .. } => Self::CannotRun(error.to_string()),
            error => Self::Other(error),
        }
    }
}

type Candidate<'a> = (
    &'static str,
    Box<dyn FnOnce() -> std::result::Result<Loaded, Refusal> + 'a>,
);

/// What may run `bundle` on a GPU, the best first.
fn candidates<'a>(
    bundle: &'a Bundle,
    library: &'a Library,
    preparation: Option<&'a Preparation>,
) -> Vec<Candidate<'a>> {
    let mut candidates: Vec<Candidate<'a>> = vec![(CUDA, Box::new(|| Ok(load_kernels(bundle)?)))];
    let Some(preparation) = preparation else {
        return candidates;
    };
    for target in PlanTarget::ALL {
        if bundle.manifest.plans_for(target.name()).is_some() {
            let load = move || {
                let executor = preparation.executor(target).map_err(Refusal::CannotRun)?;
                Ok(load_plans(bundle, library, executor)?)
            };
            candidates.push((target.name(), Box::new(load)));
        }
    }
    let load = || {
        bundle.graphs_for_cuda()?;
        preparation.provider().map_err(Refusal::CannotRun)?;
        Ok(load_graphs(bundle, library, PlanDevice::Cuda)?)
    };
    candidates.push((ONNXRUNTIME_CUDA, Box::new(load)));
    candidates
}

/// A chain over the bundle's CUDA kernels.
fn load_kernels(bundle: &Bundle) -> Result<Loaded> {
    Ok(Loaded::new(Chain::load_cuda(bundle)?, BackendName::Cuda))
}

/// A chain over ONNX Runtime's engines on the CPU.
fn load_engines(bundle: &Bundle, library: &Library) -> Result<Loaded> {
    let chain = Chain::load(bundle, Layout::Engines, &library.path, library.threads)?;
    Ok(Loaded::new(chain, BackendName::Onnxruntime))
}

/// A chain over the graphs that ONNX Runtime runs on `device`.
fn load_graphs(bundle: &Bundle, library: &Library, device: PlanDevice) -> Result<Loaded> {
    bundle.graphs_for_cuda()?;
    let (path, threads) = (&library.path, library.threads);
    let exits = || Exits::of(bundle, path, threads);
    let chain = match device {
        PlanDevice::Cuda => {
            let gpu = Cuda::new()?;
            let device = GraphDevice::Cuda(gpu.stream());
            let executor = Arc::new(GraphExecutor::new(bundle, device, path, threads)?);
            Chain::over(
                bundle,
                TensorRt::load_graphs(bundle, gpu, executor, exits()?)?,
            )
        }
        PlanDevice::Host => {
            let executor = GraphExecutor::new(bundle, GraphDevice::Host, path, threads)?;
            let (host, executor) = (Host::default(), Arc::new(executor));
            Chain::over(
                bundle,
                TensorRt::load_graphs(bundle, host, executor, exits()?)?,
            )
        }
    };
    Ok(Loaded::new(chain, BackendName::OnnxruntimeCuda))
}

/// A chain over the plans that `executor` runs.
fn load_plans(bundle: &Bundle, library: &Library, executor: PythonExecutor) -> Result<Loaded> {
    let exits = Exits::of(bundle, &library.path, library.threads)?;
    let backend = BackendName::Plans(executor.target);
    let (target, device) = (executor.target.name(), executor.device);
    let executor = Arc::new(executor);
    let chain = match device {
        PlanDevice::Cuda => {
            let gpu = Cuda::new()?;
            Chain::over(
                bundle,
                TensorRt::load(bundle, target, gpu, executor, exits)?,
            )
        }
        PlanDevice::Host => {
            let host = Host::default();
            Chain::over(
                bundle,
                TensorRt::load(bundle, target, host, executor, exits)?,
            )
        }
    };
    Ok(Loaded::new(chain, backend))
}
