//! The tensors of a kernel's run, without the copies of their types that `ort` makes: a layer has eleven,
//! and 3 us of a row's 15 went to them.

use std::ffi::c_void;
use std::ptr;
use std::slice;

use ort::sys::{ONNXTensorElementDataType, OrtApi, OrtKernelContext, OrtStatusPtr, OrtValue};

use super::Result;
use super::operator::release;

/// A run of a kernel: both are live while it lasts.
pub(super) struct Run {
    pub(super) api: &'static OrtApi,
    pub(super) context: *mut OrtKernelContext,
}

impl Run {
    /// Call `work` with each number below `count`, on the threads of the session.
    pub(super) fn in_parallel(&self, count: usize, work: &(dyn Fn(usize) + Sync)) -> Result<()> {
        unsafe extern "C" fn call(work: *mut c_void, index: usize) {
            // SAFETY: it is the reference below, which outlives the calls.
            let work = unsafe { *work.cast::<&(dyn Fn(usize) + Sync)>() };
            work(index);
        }
        let work: *const &(dyn Fn(usize) + Sync) = &work;
        // SAFETY: the context is live, and the call returns when all calls have.
        let status = unsafe {
            let run = self.api.KernelContext_ParallelFor;
            run(self.context, call, count, 0, work.cast_mut().cast())
        };
        self.checked(status, "its threads do not run")
    }

    fn checked(&self, status: OrtStatusPtr, problem: &'static str) -> Result<()> {
        match release(self.api, status) {
            true => Ok(()),
            false => Err(problem),
        }
    }
}

/// What tensors are of.
pub(super) trait Element: Copy {
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
pub(super) struct Tensor<'a, T> {
    pub(super) shape: &'a [i64],
    data: *mut T,
}

impl<'a, T: Element> Tensor<'a, T> {
    /// The input `index` of `run`; None where it is left out.
    ///
    /// # Errors
    /// Where it is of another type.
    pub(super) fn input(run: &'a Run, index: usize) -> Result<Option<Self>> {
        let mut value: *const OrtValue = ptr::null();
        // SAFETY: the context is live, and `value` is written by the call.
        let status = unsafe { (run.api.KernelContext_GetInput)(run.context, index, &mut value) };
        run.checked(status, "an input cannot be had")?;
        match value.is_null() {
            true => Ok(None),
            // SAFETY: inputs are live while the kernel runs.
            false => unsafe { Self::of(run, value.cast_mut()) }.map(Some),
        }
    }

    /// The output `index` of `run`, of `shape`.
    ///
    /// # Errors
    /// Where it is bound to memory of another shape or type.
    pub(super) fn output(run: &'a Run, index: usize, shape: &[i64]) -> Result<Self> {
        let mut value = ptr::null_mut();
        // SAFETY: the context is live, the shape has as many sizes as are said, and `value` is written by
        // the call.
        let status = unsafe {
            let get = run.api.KernelContext_GetOutput;
            get(run.context, index, shape.as_ptr(), shape.len(), &mut value)
        };
        run.checked(status, "an output cannot be had")?;
        if value.is_null() {
            return Err("an output is missing");
        }
        // SAFETY: outputs are live while the kernel runs.
        unsafe { Self::of(run, value) }
    }

    /// # Safety
    /// `value` is live while the kernel runs.
    unsafe fn of(run: &Run, value: *mut OrtValue) -> Result<Self> {
        let mut element = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        let (mut sizes, mut rank, mut data) = (ptr::null(), 0, ptr::null_mut());
        // SAFETY: what the caller promises; all others are written by the calls.
        let (typed, given) = unsafe {
            let describe = run.api.GetTensorElementTypeAndShapeDataReference;
            (
                describe(value, &mut element, &mut sizes, &mut rank),
                (run.api.GetTensorMutableData)(value, &mut data),
            )
        };
        run.checked(typed, "a value that is no tensor")?;
        run.checked(given, "a tensor without numbers")?;
        if element != T::TYPE {
            return Err("a tensor of another type");
        }
        let shape = match rank {
            0 => &[],
            // SAFETY: the sizes belong to the tensor.
            _ => unsafe { slice::from_raw_parts(sizes, rank) },
        };
        Ok(Self {
            shape,
            data: data.cast(),
        })
    }

    fn count(&self) -> usize {
        let sizes = self
            .shape
            .iter()
            .map(|&size| usize::try_from(size).unwrap_or(0));
        sizes.product()
    }

    /// The first number's address.
    pub(super) fn address(&self) -> *const T {
        self.data
    }

    /// Whether the two share memory.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
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
    pub(super) unsafe fn numbers(&self) -> &'a [T] {
        match self.count() {
            0 => &[],
            // SAFETY: they belong to the tensor, which ONNX Runtime has allocated for its shape; and what
            // the caller promises.
            count => unsafe { slice::from_raw_parts(self.data, count) },
        }
    }

    /// The numbers of an output.
    ///
    /// # Safety
    /// Nothing else reads or writes them while the slice lives.
    pub(super) unsafe fn numbers_mut(&mut self) -> &'a mut [T] {
        match self.count() {
            0 => &mut [],
            // SAFETY: as in `numbers`.
            count => unsafe { slice::from_raw_parts_mut(self.data, count) },
        }
    }
}
