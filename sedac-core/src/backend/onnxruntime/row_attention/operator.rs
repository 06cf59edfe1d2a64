//! The operator as ONNX Runtime's C interface has it, for any copy of the library in the process: the
//! chain's, and the one in Python's onnxruntime, which has an interface of its own. `ort`'s operators call
//! the first that was loaded.

use std::any::Any;
use std::ffi::{CStr, CString, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use ort::sys::{
    ONNXTensorElementDataType, ORT_API_VERSION, OrtApi, OrtApiBase, OrtCustomOp,
    OrtCustomOpInputOutputCharacteristic, OrtErrorCode, OrtKernelContext, OrtKernelInfo,
    OrtMemType, OrtSessionOptions, OrtStatusPtr,
};

use super::tensors::Run;
use super::{Result, RowAttention};

/// The operator's domain and name in graphs.
pub(super) const DOMAIN: &CStr = c"sedac";
pub(super) const NAME: &CStr = c"RowAttention";

const INDICES: [usize; 2] = [5, 6];
const OPTIONAL: [usize; 4] = [1, 2, 7, 8];
const INPUTS: usize = 9;
const OUTPUTS: usize = 3;

static OPERATOR: OrtCustomOp = OrtCustomOp {
    version: ORT_API_VERSION,
    CreateKernel: None,
    GetName: Some(name),
    GetExecutionProviderType: Some(provider),
    GetInputType: Some(input_type),
    GetInputTypeCount: Some(input_count),
    GetOutputType: Some(output_type),
    GetOutputTypeCount: Some(output_count),
    KernelCompute: None,
    KernelDestroy: Some(destroy),
    GetInputCharacteristic: Some(input_characteristic),
    GetOutputCharacteristic: Some(output_characteristic),
    GetInputMemoryType: Some(input_memory),
    GetVariadicInputMinArity: None,
    GetVariadicInputHomogeneity: None,
    GetVariadicOutputMinArity: None,
    GetVariadicOutputHomogeneity: None,
    CreateKernelV2: Some(create),
    KernelComputeV2: Some(compute),
    InferOutputShapeFn: None,
    GetStartVersion: Some(first_version),
    GetEndVersion: Some(last_version),
    GetMayInplace: None,
    ReleaseMayInplace: None,
    GetAliasMap: None,
    ReleaseAliasMap: None,
};

/// A node's, and the interface of the library that runs it.
struct Kernel {
    api: &'static OrtApi,
    attention: RowAttention,
}

/// Let sessions with `options` have the operator.
///
/// # Safety
/// The options and the interface are those of one library, and live; the interface stays.
pub(in super::super) unsafe fn register(
    options: *mut OrtSessionOptions,
    api: &OrtApi,
) -> OrtStatusPtr {
    let mut domain = ptr::null_mut();
    // SAFETY: what the caller promises; the operator is static, and sessions may go on using the domain,
    // which is some bytes and stays.
    unsafe {
        let status = (api.CreateCustomOpDomain)(DOMAIN.as_ptr(), &mut domain);
        if !status.0.is_null() {
            return status;
        }
        let status = (api.CustomOpDomain_Add)(domain, &OPERATOR);
        if !status.0.is_null() {
            return status;
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
        // an older library: sessions with the operator will say that they do not know it
        None => OrtStatusPtr::default(),
    }
}

unsafe extern "system" fn name(_: *const OrtCustomOp) -> *const std::ffi::c_char {
    NAME.as_ptr()
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

unsafe extern "system" fn input_count(_: *const OrtCustomOp) -> usize {
    INPUTS
}

unsafe extern "system" fn output_count(_: *const OrtCustomOp) -> usize {
    OUTPUTS
}

unsafe extern "system" fn input_type(
    _: *const OrtCustomOp,
    index: usize,
) -> ONNXTensorElementDataType {
    match INDICES.contains(&index) {
        true => ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
        false => ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
    }
}

unsafe extern "system" fn output_type(
    _: *const OrtCustomOp,
    _: usize,
) -> ONNXTensorElementDataType {
    ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
}

unsafe extern "system" fn input_characteristic(
    _: *const OrtCustomOp,
    index: usize,
) -> OrtCustomOpInputOutputCharacteristic {
    match OPTIONAL.contains(&index) {
        true => OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_OPTIONAL,
        false => OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_REQUIRED,
    }
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

/// # Safety
/// The interface stays, `info` is live, and `kernel` can be written.
unsafe extern "system" fn create(
    _: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: what ONNX Runtime promises.
    let api: &'static OrtApi = unsafe { &*api };
    let count = |name: &CStr| {
        let mut count = 0;
        // SAFETY: what ONNX Runtime promises; `count` is written where there is such an attribute.
        let status = unsafe { (api.KernelInfoGetAttribute_int64)(info, name.as_ptr(), &mut count) };
        release(api, status);
        usize::try_from(count).unwrap_or(0)
    };
    let number = |name: &CStr| {
        let mut number = 0.0;
        // SAFETY: as above.
        let status =
            unsafe { (api.KernelInfoGetAttribute_float)(info, name.as_ptr(), &mut number) };
        release(api, status);
        number
    };
    let attention = RowAttention::of_attributes(count, number);
    let created = Box::into_raw(Box::new(Kernel { api, attention }));
    // SAFETY: as above.
    unsafe { *kernel = created.cast() };
    OrtStatusPtr::default()
}

/// # Safety
/// The kernel is one that `create` made, which nothing else uses now, and the context is live.
unsafe extern "system" fn compute(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: what ONNX Runtime promises.
    let kernel = unsafe { &mut *kernel.cast::<Kernel>() };
    let run = Run {
        api: kernel.api,
        context,
    };
    let computed = catch_unwind(AssertUnwindSafe(|| kernel.attention.compute(&run)));
    status_of(kernel.api, computed)
}

/// # Safety
/// The kernel is one that `create` made, which is not used any more.
unsafe extern "system" fn destroy(kernel: *mut c_void) {
    // SAFETY: what ONNX Runtime promises.
    drop(unsafe { Box::from_raw(kernel.cast::<Kernel>()) });
}

fn status_of(
    api: &OrtApi,
    computed: std::result::Result<Result<()>, Box<dyn Any + Send>>,
) -> OrtStatusPtr {
    let problem = match computed {
        Ok(Ok(())) => return OrtStatusPtr::default(),
        Ok(Err(problem)) => problem,
        // the panic's own message is on stderr
        Err(_) => "a panic",
    };
    let text = format!("sedac.RowAttention: {problem}");
    let text = CString::new(text).unwrap_or_default();
    // SAFETY: the text is live during the call.
    unsafe { (api.CreateStatus)(OrtErrorCode::ORT_FAIL, text.as_ptr()) }
}

/// Give `status` back, and say whether there was none.
pub(super) fn release(api: &OrtApi, status: OrtStatusPtr) -> bool {
    if !status.0.is_null() {
        // SAFETY: the status is the caller's, who does not use it again.
        unsafe { (api.ReleaseStatus)(status.0) };
    }
    status.0.is_null()
}
