//! The few calls into `ort` that the backend needs, with errors that say what they were about.

use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::ep::CPU;
use ort::logging::LogLevel;
use ort::memory::Allocator;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, Session};
use ort::value::{
    DynTensor, PrimitiveTensorElementType, Shape, Tensor, TensorElementType, Value, ValueTypeMarker,
};
use ort::{AsPointer, LoadDynamicError};

use crate::bundle::Bundle;
use crate::error::{Error, Result};

/// The process's ONNX Runtime and its number of threads. Sessions that spin pools of their own
/// starve each other, so all share one.
static ENVIRONMENT: Mutex<Option<(Environment, usize)>> = Mutex::new(None);

/// The process's environment, made at the first call.
pub(super) fn environment(library: &Path, threads: usize) -> Result<Environment> {
    let mut current = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((environment, running)) = &*current {
        if *running != threads {
            return Err(Error::setting(
                "threads",
                threads,
                format!("{running} only, which this process started ONNX Runtime with"),
            ));
        }
        return Ok(environment.clone());
    }
    let environment = start(library, threads)?;
    *current = Some((environment.clone(), threads));
    Ok(environment)
}

fn start(library: &Path, threads: usize) -> Result<Environment> {
    let failed = |reason: String| Error::Library {
        path: library.to_owned(),
        reason,
    };
    let builder = ort::init_from(library).map_err(|error| {
        failed(match error {
            LoadDynamicError::BadVersion { version_str, .. } => {
                format!("it is version {version_str}")
            }
            error => error.to_string(),
        })
    })?;
    let build = || {
        let pool = GlobalThreadPoolOptions::default()
            .with_intra_threads(threads)?
            .with_inter_threads(1)?;
        builder
            .with_name("sedac")
            .with_telemetry(false)
            .with_global_thread_pool(pool)
            .build()
    };
    let environment = build().map_err(|error: ort::Error| failed(error.to_string()))?;
    // what fails is in the error that is returned
    environment.set_log_level(LogLevel::Fatal);
    Ok(environment)
}

/// Where weights are looked for that are not in a graph loaded from memory:
/// kOrtSessionOptionsModelExternalInitializersFileFolderPath.
const WEIGHTS_DIRECTORY: &str = "session.model_external_initializers_file_folder_path";

/// Load the graph in `file` of `bundle`.
///
/// Sessions get no arena and no memory plans of their own: with plain allocation the buffers that
/// one layer gives back are the ones the next takes, and dozens of engines hold nothing between
/// runs, however many lengths of prompt they have seen.
/// `sedac-runtime bench --against monolith` measures what the chain costs.
pub(super) fn session(environment: &Environment, bundle: &Bundle, file: &Path) -> Result<Session> {
    let (graph, directory) = bundle.gate.graph(file)?;
    let load = || {
        Session::builder(environment)?
            .with_optimization_level(GraphOptimizationLevel::Level3)?
            .with_memory_pattern(false)?
            .with_execution_providers([CPU::default().with_arena_allocator(false).build()])?
            .with_config_entry(WEIGHTS_DIRECTORY, directory.to_string_lossy())?
            // what was checked is ONNX, and the same bytes may be ONNX Runtime's own format, too
            .with_config_entry("session.load_model_format", "ONNX")?
            .commit_from_memory(&graph)
    };
    let what = || format!("{} cannot be loaded", bundle.gate.shown(file).display());
    load().map_err(|source| engine_error(what(), source))
}

/// A tensor of zeros in memory that engines can read and write in place.
pub(super) fn tensor<T>(shape: &[usize]) -> Result<Tensor<T>>
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Default + Copy,
{
    let mut tensor = Tensor::new(&Allocator::default(), to_shape(shape)).map_err(no_memory)?;
    tensor.extract_tensor_mut().1.fill(T::default());
    Ok(tensor)
}

/// A tensor whose element type is known at run time only. Its contents are undefined.
pub(super) fn dyn_tensor(element: TensorElementType, shape: &[usize]) -> Result<DynTensor> {
    DynTensor::new(&Allocator::default(), element, to_shape(shape)).map_err(no_memory)
}

/// The numbers in `tensor`.
pub(super) fn read<T: PrimitiveTensorElementType + std::fmt::Debug>(tensor: &Tensor<T>) -> &[T] {
    tensor.extract_tensor().1
}

/// Overwrite `tensor` with as many numbers as it holds.
pub(super) fn write<T>(tensor: &mut Tensor<T>, values: &[T])
where
    T: PrimitiveTensorElementType + std::fmt::Debug + Copy,
{
    tensor.extract_tensor_mut().1.copy_from_slice(values);
}

pub(super) fn binding(session: &Session) -> Result<IoBinding> {
    session
        .create_binding()
        .map_err(|source| engine_error("a binding cannot be made".into(), source))
}

pub(super) fn bind_input<T: ValueTypeMarker + ?Sized>(
    binding: &mut IoBinding,
    name: &str,
    value: &Value<T>,
) -> Result<()> {
    binding
        .bind_input(name, value)
        .map_err(|source| engine_error(format!("input {name} cannot be bound"), source))
}

pub(super) fn bind_output<T: ValueTypeMarker + ?Sized>(
    binding: &mut IoBinding,
    name: &str,
    value: &mut Value<T>,
) -> Result<()> {
    binding
        .bind_output(name, value)
        .map_err(|source| engine_error(format!("output {name} cannot be bound"), source))
}

/// Run `session` over bound tensors; `what` names it in an error.
///
/// `Session::run_binding` would also fetch the bound outputs, at a cost that shows when a token
/// passes dozens of engines; here they are in tensors of ours already.
pub(super) fn run(
    session: &mut Session,
    binding: &IoBinding,
    what: impl Fn() -> String,
) -> Result<()> {
    // SAFETY: both pointers are live, and the call keeps neither. `binding` shares the ownership of
    // all values bound in it, so that these live too; ONNX Runtime compares their names, types and
    // shapes with the session's in every run and fails when the binding is another session's. It
    // reads and writes them until it returns: slices of them (`read`, `write`) are borrowed from
    // tensors that belong to the same structures as `session` and `binding`, and none is kept over
    // a run but those of tensors bound elsewhere. The status goes to `result_from_status` once.
    let result = unsafe {
        let run = ort::api().RunWithBinding;
        ort::Error::result_from_status(run(session.ptr_mut(), ptr::null(), binding.ptr()))
    };
    result.map_err(|source| engine_error(format!("{} failed", what()), source))
}

fn to_shape(shape: &[usize]) -> Shape {
    shape.iter().map(|&size| size as i64).collect()
}

fn no_memory(source: ort::Error) -> Error {
    engine_error("a tensor cannot be allocated".into(), source)
}

fn engine_error(what: String, source: ort::Error) -> Error {
    Error::Engine { what, source }
}
