//! Operators of the chain's own as ONNX Runtime's C interface has them, for any copy of the library in the
//! process: the chain's, and the one in Python's onnxruntime, which has an interface of its own. `ort`'s
//! operators call the first that was loaded.

mod tensors;

use std::any::Any;
use std::ffi::{CStr, CString, c_int, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use ort::sys::{
    ONNXTensorElementDataType, ORT_API_VERSION, OrtApi, OrtApiBase, OrtCustomOp,
    OrtCustomOpInputOutputCharacteristic, OrtErrorCode, OrtKernelContext, OrtKernelInfo,
    OrtMemType, OrtSessionOptions, OrtStatusPtr,
};

pub(super) use self::tensors::{Element, NodeInfo, Run, Tensor};
#[cfg(target_arch = "x86_64")]
use super::half_matmul::HalfMatMul;
#[cfg(target_arch = "x86_64")]
use super::quantized_matmul::QuantizedMatMul;
use super::row_attention::RowAttention;

/// The operators' domain in graphs.
pub(super) const DOMAIN: &CStr = c"sedac";

/// What went wrong in an operator.
pub(super) type Result<T> = std::result::Result<T, &'static str>;

/// An operator, made for a node of a graph. Its outputs are fp32.
pub(super) trait CustomOperator: Sized + Send + Sync {
    /// Its name in graphs.
    const NAME: &'static CStr;
    /// Its inputs; the last one may stand for several.
    const INPUTS: &'static [Input];
    /// How many outputs it has.
    const OUTPUTS: usize;

    /// The operator of `node`.
    ///
    /// # Errors
    /// Where the node is none that it can be.
    fn new(node: &NodeInfo) -> Result<Self>;

    /// Compute the outputs of `run`. Several threads may share a session.
    ///
    /// # Errors
    /// Where inputs or outputs are none that the operator knows.
    fn compute(&self, run: &Run) -> Result<()>;
}

/// An input of an operator.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    element: ONNXTensorElementDataType,
    presence: OrtCustomOpInputOutputCharacteristic,
}

impl Input {
    /// fp32
    pub(super) const FLOATS: Self =
        Self::of(ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    /// int64
    pub(super) const INTEGERS: Self =
        Self::of(ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    /// Any number of inputs of any types, but one at least.
    pub(super) const VARIADIC: Self = Self {
        element: ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED,
        presence: OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_VARIADIC,
    };

    const fn of(element: ONNXTensorElementDataType) -> Self {
        Self {
            element,
            presence: OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_REQUIRED,
        }
    }

    /// The input, which may be left out.
    pub(super) const fn optional(self) -> Self {
        Self {
            element: self.element,
            presence: OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_OPTIONAL,
        }
    }
}

/// What ONNX Runtime calls of an operator.
struct Table<T>(PhantomData<T>);

impl<T: CustomOperator> Table<T> {
    const TABLE: &'static OrtCustomOp = &OrtCustomOp {
        version: ORT_API_VERSION,
        CreateKernel: None,
        GetName: Some(name::<T>),
        GetExecutionProviderType: Some(provider),
        GetInputType: Some(input_type::<T>),
        GetInputTypeCount: Some(input_count::<T>),
        GetOutputType: Some(output_type),
        GetOutputTypeCount: Some(output_count::<T>),
        KernelCompute: None,
        KernelDestroy: Some(destroy::<T>),
        GetInputCharacteristic: Some(input_characteristic::<T>),
        GetOutputCharacteristic: Some(output_characteristic),
        GetInputMemoryType: Some(input_memory),
        GetVariadicInputMinArity: Some(variadic_min_arity),
        GetVariadicInputHomogeneity: Some(variadic_homogeneous),
        GetVariadicOutputMinArity: None,
        GetVariadicOutputHomogeneity: None,
        CreateKernelV2: Some(create::<T>),
        KernelComputeV2: Some(compute::<T>),
        InferOutputShapeFn: None,
        GetStartVersion: Some(first_version),
        GetEndVersion: Some(last_version),
        GetMayInplace: None,
        ReleaseMayInplace: None,
        GetAliasMap: None,
        ReleaseAliasMap: None,
    };
}

/// A node's operator, and the interface of the library that runs it.
struct Kernel<T> {
    api: &'static OrtApi,
    operator: T,
}

/// Let sessions with `options` have the operators.
///
/// # Safety
/// The options and the interface are those of one library, and live; the interface stays.
pub(super) unsafe fn register(options: *mut OrtSessionOptions, api: &OrtApi) -> OrtStatusPtr {
    let mut domain = ptr::null_mut();
    let operators = [
        Table::<RowAttention>::TABLE,
        #[cfg(target_arch = "x86_64")]
        Table::<QuantizedMatMul>::TABLE,
        #[cfg(target_arch = "x86_64")]
        Table::<HalfMatMul>::TABLE,
    ];
    // SAFETY: what the caller promises; operators are static, and sessions may go on using the domain,
    // which is some bytes and stays.
    unsafe {
        let status = (api.CreateCustomOpDomain)(DOMAIN.as_ptr(), &mut domain);
        if !status.0.is_null() {
            return status;
        }
        for operator in operators {
            let status = (api.CustomOpDomain_Add)(domain, operator);
            if !status.0.is_null() {
                return status;
            }
        }
        (api.AddCustomOpDomain)(options, domain)
    }
}

/// What ONNX Runtime calls of a library of operators.
///
/// # Safety
/// As it does: the options are live, and the interface is the one of their library.
#[unsafe(export_name = "RegisterCustomOps")]
unsafe extern "C" fn register_custom_ops(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    // SAFETY: what the caller promises.
    let api = unsafe { ((*base).GetApi)(ORT_API_VERSION) };
    // SAFETY: interfaces are static.
    match unsafe { api.as_ref() } {
        // SAFETY: what the caller promises.
        Some(api) => unsafe { register(options, api) },
        // an older library: sessions with the operators will say that they do not know them
        None => OrtStatusPtr::default(),
    }
}

unsafe extern "system" fn name<T: CustomOperator>(
    _: *const OrtCustomOp,
) -> *const std::ffi::c_char {
    T::NAME.as_ptr()
}

unsafe extern "system" fn provider(_: *const OrtCustomOp) -> *const std::ffi::c_char {
    ptr::null()
}

unsafe extern "system" fn first_version(_: *const OrtCustomOp) -> c_int {
    1
}

unsafe extern "system" fn last_version(_: *const OrtCustomOp) -> c_int {
    1
}

unsafe extern "system" fn input_count<T: CustomOperator>(_: *const OrtCustomOp) -> usize {
    T::INPUTS.len()
}

unsafe extern "system" fn output_count<T: CustomOperator>(_: *const OrtCustomOp) -> usize {
    T::OUTPUTS
}

unsafe extern "system" fn input_type<T: CustomOperator>(
    _: *const OrtCustomOp,
    index: usize,
) -> ONNXTensorElementDataType {
    T::INPUTS[index].element
}

unsafe extern "system" fn output_type(
    _: *const OrtCustomOp,
    _: usize,
) -> ONNXTensorElementDataType {
    ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
}

unsafe extern "system" fn input_characteristic<T: CustomOperator>(
    _: *const OrtCustomOp,
    index: usize,
) -> OrtCustomOpInputOutputCharacteristic {
    T::INPUTS[index].presence
}

unsafe extern "system" fn output_characteristic(
    _: *const OrtCustomOp,
    _: usize,
) -> OrtCustomOpInputOutputCharacteristic {
    OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_REQUIRED
}

unsafe extern "system" fn input_memory(_: *const OrtCustomOp, _: usize) -> OrtMemType {
    OrtMemType::OrtMemTypeDefault
}

unsafe extern "system" fn variadic_min_arity(_: *const OrtCustomOp) -> c_int {
    1
}

unsafe extern "system" fn variadic_homogeneous(_: *const OrtCustomOp) -> c_int {
    0
}

/// # Safety
/// The interface stays, `info` is live, and `kernel` can be written.
unsafe extern "system" fn create<T: CustomOperator>(
    _: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: what ONNX Runtime promises.
    let api: &'static OrtApi = unsafe { &*api };
    let made = catch_unwind(|| T::new(&NodeInfo { api, info }));
    match outcome::<T, _>(made) {
        Ok(operator) => {
            let created = Box::into_raw(Box::new(Kernel { api, operator }));
            // SAFETY: what ONNX Runtime promises.
            unsafe { *kernel = created.cast() };
            OrtStatusPtr::default()
        }
        Err(problem) => status_of(api, &problem),
    }
}

/// # Safety
/// The kernel is one that `create` made and `destroy` was not called with, and the context is live.
unsafe extern "system" fn compute<T: CustomOperator>(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: what ONNX Runtime promises.
    let kernel = unsafe { &*kernel.cast::<Kernel<T>>() };
    let run = Run {
        api: kernel.api,
        context,
    };
    let computed = catch_unwind(AssertUnwindSafe(|| kernel.operator.compute(&run)));
    match outcome::<T, _>(computed) {
        Ok(()) => OrtStatusPtr::default(),
        Err(problem) => status_of(kernel.api, &problem),
    }
}

/// # Safety
/// The kernel is one that `create` made, which is not used any more.
unsafe extern "system" fn destroy<T: CustomOperator>(kernel: *mut c_void) {
    // SAFETY: what ONNX Runtime promises.
    drop(unsafe { Box::from_raw(kernel.cast::<Kernel<T>>()) });
}

/// What `T` made, or what to say of what went wrong.
fn outcome<T: CustomOperator, R>(
    made: std::result::Result<Result<R>, Box<dyn Any + Send>>,
) -> std::result::Result<R, CString> {
    // a panic's own message is on stderr
    let made = made.unwrap_or(Err("a panic"));
    made.map_err(|problem| {
        let text = format!("sedac.{}: {problem}", T::NAME.to_string_lossy());
        CString::new(text).unwrap_or_default()
    })
}

fn status_of(api: &OrtApi, problem: &CStr) -> OrtStatusPtr {
    // SAFETY: the text is live during the call.
    unsafe { (api.CreateStatus)(OrtErrorCode::ORT_FAIL, problem.as_ptr()) }
}

/// Give `status` back, and say whether there was none.
fn release(api: &OrtApi, status: OrtStatusPtr) -> bool {
    if !status.0.is_null() {
        // SAFETY: the status is the caller's, who does not use it again.
        unsafe { (api.ReleaseStatus)(status.0) };
    }
    status.0.is_null()
}
