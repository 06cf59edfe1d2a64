//! The few calls into `ort` that the backend needs, with errors that say what they were about.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::ep::cuda::AttentionBackend;
use ort::ep::{ArenaExtendStrategy, CPU, CUDA, ExecutionProviderDispatch};
use ort::logging::LogLevel;
use ort::memory::{Allocator, MemoryInfo};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::{
    DynTensor, Outlet, PrimitiveTensorElementType, Shape, Tensor, TensorElementType, Value,
    ValueType, ValueTypeMarker,
};
use ort::{AsPointer, LoadDynamicError};

use super::operator::register;
use super::own_operators::{with_own_operators, with_own_products};
use super::{huge_pages, stability_output};
use crate::bundle::{Bundle, LayerEntry};
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
    huge_pages::register(&environment).map_err(provider_error)?;
    Ok(environment)
}

/// Where weights are looked for that are not in a graph loaded from memory:
/// kOrtSessionOptionsModelExternalInitializersFileFolderPath.
const WEIGHTS_DIRECTORY: &str = "session.model_external_initializers_file_folder_path";

/// A session fails to load rather than leave a node to the CPU.
const NO_CPU_NODES: &str = "session.disable_cpu_ep_fallback";

/// What computes the nodes of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provider {
    /// The CPU.
    Cpu,
    /// The first GPU, on a stream of the driver's.
    Cuda(u64),
}

impl Provider {
    /// # Safety
    /// The stream is live, and stays so while sessions of the provider run.
    unsafe fn dispatch(self) -> ExecutionProviderDispatch {
        match self {
            // Sessions get no arena and no memory plans of their own: with plain allocation the
            // buffers that one layer gives back are the ones the next takes, and dozens of engines
            // hold nothing between runs, however many lengths of prompt they have seen.
            // `sedac-runtime bench --against monolith` measures what the chain costs.
            Self::Cpu => CPU::default().with_arena_allocator(false).build(),
            Self::Cuda(stream) => {
                // captured work goes on using the arena; it grows by what is asked for, since there
                // are dozens of them
                let provider = CUDA::default()
                    .with_device_id(0)
                    .with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested)
                    // not cuDNN's attention, which ONNX Runtime prefers: it reads and writes
                    // elsewhere when replayed from a capture (an H200, onnxruntime-gpu 1.31)
                    .with_attention_backend(
                        AttentionBackend::FLASH_ATTENTION
                            | AttentionBackend::EFFICIENT_ATTENTION
                            | AttentionBackend::MATH,
                    );
                // SAFETY: what the caller promises.
                let provider = unsafe {
                    provider.with_compute_stream(ptr::without_provenance_mut(stream as usize))
                };
                provider.build().error_on_failure()
            }
        }
    }
}

/// Load the graph in `file` of `bundle` for the CPU, with products of its own.
pub(super) fn session(environment: &Environment, bundle: &Bundle, file: &Path) -> Result<Session> {
    let (graph, directory) = bundle.gate.graph(file)?;
    let graph = with_own_products(&graph).unwrap_or(graph);
    // SAFETY: there is no stream.
    let loaded = unsafe { load(environment, &graph, &directory, Provider::Cpu) };
    loaded.map_err(|source| not_loaded(bundle, file, source))
}

/// The graph of the layer or attention engine `entry` of `bundle` for the CPU, and where its weights are.
/// It gives no stability where the host can compute it.
fn layer_graph(bundle: &Bundle, entry: &LayerEntry) -> Result<(Vec<u8>, PathBuf)> {
    let (mut graph, directory) = bundle.gate.graph(&entry.file)?;
    if entry.num_layers == 1
        && let Some(without) = stability_output::without(&graph)
    {
        graph = without;
    }
    Ok((graph, directory))
}

/// Load the layer or attention engine `entry` of `bundle` for the CPU, with operators of its own.
pub(super) fn layer_session(
    environment: &Environment,
    bundle: &Bundle,
    entry: &LayerEntry,
) -> Result<Session> {
    let (graph, directory) = layer_graph(bundle, entry)?;
    let graph = with_own_operators(&graph).unwrap_or(graph);
    // SAFETY: there is no stream.
    let loaded = unsafe { load(environment, &graph, &directory, Provider::Cpu) };
    loaded.map_err(|source| not_loaded(bundle, &entry.file, source))
}

/// Load the graph in `file` of `bundle` for `provider`, which takes all of its nodes or fails.
///
/// # Safety
/// As [`Provider::dispatch`].
pub(super) unsafe fn device_session(
    environment: &Environment,
    bundle: &Bundle,
    file: &Path,
    provider: Provider,
) -> Result<Session> {
    let (graph, directory) = bundle.gate.graph(file)?;
    // SAFETY: what the caller promises.
    let loaded = unsafe { load(environment, &graph, &directory, provider) };
    loaded.map_err(|source| not_loaded(bundle, file, source))
}

fn not_loaded(bundle: &Bundle, file: &Path, source: ort::Error) -> Error {
    let shown = bundle.gate.shown(file);
    engine_error(format!("{} cannot be loaded", shown.display()), source)
}

/// # Safety
/// As [`Provider::dispatch`].
unsafe fn load(
    environment: &Environment,
    graph: &[u8],
    directory: &Path,
    provider: Provider,
) -> ort::Result<Session> {
    let no_cpu_nodes = if provider == Provider::Cpu { "0" } else { "1" };
    // SAFETY: what the caller promises.
    let provider = unsafe { provider.dispatch() };
    let mut builder = Session::builder(environment)?;
    // SAFETY: both are those of the library that is loaded.
    unsafe {
        ort::Error::result_from_status(register(builder.ptr_mut(), ort::api()))?;
    }
    builder
        .with_optimization_level(GraphOptimizationLevel::Level3)?
        .with_memory_pattern(false)?
        .with_execution_providers([provider])?
        .with_config_entry(NO_CPU_NODES, no_cpu_nodes)?
        .with_env_allocators()?
        .with_config_entry(WEIGHTS_DIRECTORY, directory.to_string_lossy())?
        // what was checked is ONNX, and the same bytes may be ONNX Runtime's own format, too
        .with_config_entry("session.load_model_format", "ONNX")?
        .commit_from_memory(graph)
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

/// Whether a tensor goes into a session or comes out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Input,
    Output,
}

/// Memory of a device in which a tensor lies.
pub(super) struct Memory<'a> {
    pub(super) info: &'a MemoryInfo<'static>,
    pub(super) address: u64,
    pub(super) shape: &'a [usize],
    pub(super) bytes: usize,
}

/// Bind `memory` as the session's tensor `value`.
///
/// # Errors
/// [`Error::Engine`] when the tensor takes other bytes than the memory has.
///
/// # Safety
/// The memory has its `bytes`, which live, and which nothing else uses, until the work of the binding
/// is done.
pub(super) unsafe fn bind_memory(
    binding: &mut IoBinding,
    side: Side,
    value: &Outlet,
    memory: &Memory<'_>,
) -> Result<()> {
    let mut bind = || {
        let name =
            CString::new(value.name()).map_err(|error| ort::Error::new(error.to_string()))?;
        let element = element_of(value, memory)?;
        let shape: Vec<i64> = memory.shape.iter().map(|&size| size as i64).collect();
        let address = ptr::with_exposed_provenance_mut(memory.address as usize);
        let api = ort::api();
        let mut tensor = ptr::null_mut();
        // SAFETY: all pointers are live, and `tensor` is written before it is read. It describes
        // memory that the caller answers for, and has the bytes of its shape, which `element_of` has
        // compared. The binding takes a share of the tensor, so that ours is released.
        unsafe {
            ort::Error::result_from_status((api.CreateTensorWithDataAsOrtValue)(
                memory.info.ptr(),
                address,
                memory.bytes,
                shape.as_ptr(),
                shape.len(),
                element.into(),
                &mut tensor,
            ))?;
            let bind = match side {
                Side::Input => api.BindInput,
                Side::Output => api.BindOutput,
            };
            let bound = bind(binding.ptr_mut(), name.as_ptr(), tensor);
            (api.ReleaseValue)(tensor);
            ort::Error::result_from_status(bound)
        }
    };
    bind().map_err(|source| engine_error(format!("{} cannot be bound", value.name()), source))
}

/// The element type of the session's tensor `value`, of which `memory` has room for exactly its
/// shape.
fn element_of(value: &Outlet, memory: &Memory<'_>) -> ort::Result<TensorElementType> {
    let ValueType::Tensor { ty, .. } = value.dtype() else {
        return Err(ort::Error::new("it is no tensor"));
    };
    let bytes = ty.byte_size(memory.shape.iter().product());
    if bytes != Some(memory.bytes) {
        let reason = format!(
            "it is {ty} of shape {:?} where the bundle's has {} bytes; build the bundle again",
            memory.shape, memory.bytes
        );
        return Err(ort::Error::new(reason));
    }
    Ok(*ty)
}

/// Run `session` over bound tensors; `what` names it in an error.
pub(super) fn run(
    session: &mut Session,
    binding: &IoBinding,
    what: impl Fn() -> String,
) -> Result<()> {
    run_with(session, binding, None, what)
}

/// As [`run`], with `options`.
///
/// `Session::run_binding` would also fetch the bound outputs, at a cost that shows when a token
/// passes dozens of engines; here they are in tensors of ours already.
pub(super) fn run_with(
    session: &mut Session,
    binding: &IoBinding,
    options: Option<&RunOptions>,
    what: impl Fn() -> String,
) -> Result<()> {
    let options = options.map_or(ptr::null(), AsPointer::ptr);
    // SAFETY: all pointers are live, and the call keeps none. `binding` shares the ownership of
    // all values bound in it, so that these live too, but for memory that `bind_memory`'s caller
    // answers for; ONNX Runtime compares their names, types and shapes with the session's in every
    // run and fails when the binding is another session's. It reads and writes them until it
    // returns: slices of them (`read`, `write`) are borrowed from tensors that belong to the same
    // structures as `session` and `binding`, and none is kept over a run but those of tensors bound
    // elsewhere. The status goes to `result_from_status` once.
    let result = unsafe {
        let run = ort::api().RunWithBinding;
        ort::Error::result_from_status(run(session.ptr_mut(), options, binding.ptr()))
    };
    result.map_err(|source| engine_error(format!("{} failed", what()), source))
}

fn to_shape(shape: &[usize]) -> Shape {
    shape.iter().map(|&size| size as i64).collect()
}

fn no_memory(source: ort::Error) -> Error {
    engine_error("a tensor cannot be allocated".into(), source)
}

pub(super) fn engine_error(what: String, source: ort::Error) -> Error {
    Error::Engine { what, source }
}

/// What is wrong with ONNX Runtime itself.
pub(super) fn provider_error(source: ort::Error) -> Error {
    engine_error("ONNX Runtime".into(), source)
}
