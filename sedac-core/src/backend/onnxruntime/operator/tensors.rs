//! A node's attributes, and the tensors of a run, without the copies of their types that `ort` makes: a layer has eleven,
//! and 3 us of a row's 15 went to them.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::sys::{
    ONNXTensorElementDataType, OrtApi, OrtKernelContext, OrtKernelInfo, OrtStatusPtr, OrtValue,
};

use super::{Result, release};

/// A node that an operator is made for: it is live meanwhile.
pub(in super::super) struct NodeInfo {
    pub(super) api: &'static OrtApi,
    pub(super) info: *const OrtKernelInfo,
}

impl NodeInfo {
    /// The attribute `name`, 0 where there is none.
    pub(in super::super) fn integer(&self, name: &CStr) -> usize {
        let mut number = 0;
        // SAFETY: the node is live, and `number` is written where there is such an attribute.
        let status = unsafe {
            (self.api.KernelInfoGetAttribute_int64)(self.info, name.as_ptr(), &mut number)
        };
        release(self.api, status);
        usize::try_from(number).unwrap_or(0)
    }

    /// The attribute `name`, 0 where there is none.
    pub(in super::super) fn number(&self, name: &CStr) -> f32 {
        let mut number = 0.0;
        // SAFETY: as in `integer`.
        let status = unsafe {
            (self.api.KernelInfoGetAttribute_float)(self.info, name.as_ptr(), &mut number)
        };
        release(self.api, status);
        number
    }

    /// How many inputs there are, those left out included.
    pub(in super::super) fn inputs(&self) -> usize {
        let mut count = 0;
        // SAFETY: the node is live, and `count` is written by the call.
        let status = unsafe { (self.api.KernelInfo_GetInputCount)(self.info, &mut count) };
        if release(self.api, status) { count } else { 0 }
    }

    /// The input `index`, which is the same in all runs.
    ///
    /// # Errors
    /// Where it is not, or of another type.
    pub(in super::super) fn constant<T: Element>(&self, index: usize) -> Result<Tensor<'_, T>> {
        let (mut is_constant, mut value) = (0, ptr::null());
        // SAFETY: the node is live, and both are written by the call.
        let status = unsafe {
            let get = self.api.KernelInfoGetConstantInput_tensor;
            get(self.info, index, &mut is_constant, &mut value)
        };
        if !release(self.api, status) || is_constant == 0 || value.is_null() {
            return Err("weights that are not in the graph");
        }
        // SAFETY: constants live as long as the session.
        unsafe { Tensor::of(self.api, value.cast_mut()) }
    }
}

/// A run of an operator: both are live while it lasts.
pub(in super::super) struct Run {
    pub(super) api: &'static OrtApi,
    pub(super) context: *mut OrtKernelContext,
}

impl Run {
    /// Call `work` with each number below `count`, on the threads of the session.
    pub(in super::super) fn in_parallel(
        &self,
        count: usize,
        work: &(dyn Fn(usize) + Sync),
    ) -> Result<()> {
        struct Work<'a> {
            call: &'a (dyn Fn(usize) + Sync),
            has_failed: AtomicBool,
        }
        unsafe extern "C" fn call(work: *mut c_void, index: usize) {
            // SAFETY: it is the work below, which outlives the calls.
            let work = unsafe { &*work.cast::<Work<'_>>() };
            if catch_unwind(AssertUnwindSafe(|| (work.call)(index))).is_err() {
                work.has_failed.store(true, Ordering::Relaxed);
            }
        }
        let given = Work {
            call: work,
            has_failed: AtomicBool::new(false),
        };
        let work: *const Work<'_> = &given;
        // SAFETY: the context is live, and the call returns when all calls have.
        let status = unsafe {
            let run = self.api.KernelContext_ParallelFor;
            run(self.context, call, count, 0, work.cast_mut().cast())
        };
        checked(self.api, status, "its threads do not run")?;
        match given.has_failed.into_inner() {
            true => Err("a panic"),
            false => Ok(()),
        }
    }
}

fn checked(api: &OrtApi, status: OrtStatusPtr, problem: &'static str) -> Result<()> {
    match release(api, status) {
        true => Ok(()),
        false => Err(problem),
    }
}

impl Element for half::f16 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}

impl Element for half::bf16 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}

impl Element for u8 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

/// What tensors are of.
pub(in super::super) trait Element: Copy + 'static {
    /// ONNX Runtime's name for it.
    const TYPE: ONNXTensorElementDataType;
}

impl Element for f32 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

impl Element for i64 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

/// A tensor while the kernel runs.
pub(in super::super) struct Tensor<'a, T> {
    pub(in super::super) shape: &'a [i64],
    data: *mut T,
}

impl<'a, T: Element> Tensor<'a, T> {
    /// The input `index` of `run`; None where it is left out.
    ///
    /// # Errors
    /// Where it is of another type.
    pub(in super::super) fn input(run: &'a Run, index: usize) -> Result<Option<Self>> {
        let mut value: *const OrtValue = ptr::null();
        // SAFETY: the context is live, and `value` is written by the call.
        let status = unsafe { (run.api.KernelContext_GetInput)(run.context, index, &mut value) };
        checked(run.api, status, "an input cannot be had")?;
        match value.is_null() {
            true => Ok(None),
            // SAFETY: inputs are live while the kernel runs.
            false => unsafe { Self::of(run.api, value.cast_mut()) }.map(Some),
        }
    }

    /// The output `index` of `run`, of `shape`.
    ///
    /// # Errors
    /// Where it is bound to memory of another shape or type.
    pub(in super::super) fn output(run: &'a Run, index: usize, shape: &[i64]) -> Result<Self> {
        let mut value = ptr::null_mut();
        // SAFETY: the context is live, the shape has as many sizes as are said, and `value` is written by
        // the call.
        let status = unsafe {
            let get = run.api.KernelContext_GetOutput;
            get(run.context, index, shape.as_ptr(), shape.len(), &mut value)
        };
        checked(run.api, status, "an output cannot be had")?;
        if value.is_null() {
            return Err("an output is missing");
        }
        // SAFETY: outputs are live while the kernel runs.
        unsafe { Self::of(run.api, value) }
    }

    /// # Safety
    /// `value` is live while the kernel runs.
    unsafe fn of(api: &OrtApi, value: *mut OrtValue) -> Result<Self> {
        let mut element = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        let (mut sizes, mut rank, mut data) = (ptr::null(), 0, ptr::null_mut());
        // SAFETY: what the caller promises; all others are written by the calls.
        let (typed, given) = unsafe {
            let describe = api.GetTensorElementTypeAndShapeDataReference;
            (
                describe(value, &mut element, &mut sizes, &mut rank),
                (api.GetTensorMutableData)(value, &mut data),
            )
        };
        checked(api, typed, "a value that is no tensor")?;
        checked(api, given, "a tensor without numbers")?;
        if element != T::TYPE {
            return Err("a tensor of another type");
        }
        let shape = match rank {
            0 => &[],
            // SAFETY: the sizes belong to the tensor.
            _ => unsafe { slice::from_raw_parts(sizes, rank) },
        };
        let data = data.cast::<T>();
        // as weights in a file may be
        if !data.is_aligned() {
            return Err("a tensor that is not aligned");
        }
        Ok(Self { shape, data })
    }

    fn count(&self) -> usize {
        let sizes = self
            .shape
            .iter()
            .map(|&size| usize::try_from(size).unwrap_or(0));
        sizes.product()
    }

    /// The first number's address.
    pub(in super::super) fn address(&self) -> *const T {
        self.data
    }

    /// Whether the two share memory.
    pub(in super::super) fn overlaps(&self, other: &Self) -> bool {
        let of = |tensor: &Self| {
            let first = tensor.data.addr();
            first..first + tensor.count() * size_of::<T>()
        };
        let (ours, theirs) = (of(self), of(other));
        ours.start < theirs.end && theirs.start < ours.end
    }

    /// The numbers of an input.
    ///
    /// # Safety
    /// Nothing writes them while the slice lives.
    pub(in super::super) unsafe fn numbers(&self) -> &'a [T] {
        match self.count() {
            0 => &[],
            // SAFETY: they belong to the tensor, which has memory for its shape, and are aligned; and what
            // the caller promises.
            count => unsafe { slice::from_raw_parts(self.data, count) },
        }
    }

    /// The numbers of an output.
    ///
    /// # Safety
    /// Nothing else reads or writes them while the slice lives.
    pub(in super::super) unsafe fn numbers_mut(&mut self) -> &'a mut [T] {
        match self.count() {
            0 => &mut [],
            // SAFETY: as in `numbers`.
            count => unsafe { slice::from_raw_parts_mut(self.data, count) },
        }
    }
}
