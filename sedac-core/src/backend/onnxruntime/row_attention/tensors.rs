//! The tensors of a kernel's run, without the copies of their types that `ort` makes: a layer has eleven,
//! and 3 us of a row's 15 went to them.

use std::ptr;
use std::slice;

use ort::AsPointer;
use ort::operator::ComputeContext;
use ort::sys::{ONNXTensorElementDataType, OrtStatusPtr, OrtValue};

use super::wrong;

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
    /// The input `index` of `context`; None where it is left out.
    ///
    /// # Errors
    /// Where it is of another type.
    pub(super) fn input(context: &'a ComputeContext, index: usize) -> ort::Result<Option<Self>> {
        let mut value: *const OrtValue = ptr::null();
        // SAFETY: the context is live, and `value` is written by the call.
        let status =
            unsafe { (ort::api().KernelContext_GetInput)(context.ptr(), index, &mut value) };
        checked(status)?;
        match value.is_null() {
            true => Ok(None),
            // SAFETY: inputs are live while the kernel runs.
            false => unsafe { Self::of(value.cast_mut()) }.map(Some),
        }
    }

    /// The output `index` of `context`, of `shape`.
    ///
    /// # Errors
    /// Where it is bound to memory of another shape or type.
    pub(super) fn output(
        context: &'a ComputeContext,
        index: usize,
        shape: &[i64],
    ) -> ort::Result<Self> {
        let mut value = ptr::null_mut();
        // SAFETY: the context is live, the shape has as many sizes as are said, and `value` is written by
        // the call.
        let status = unsafe {
            let get = ort::api().KernelContext_GetOutput;
            get(
                context.ptr().cast_mut(),
                index,
                shape.as_ptr(),
                shape.len(),
                &mut value,
            )
        };
        checked(status)?;
        if value.is_null() {
            return Err(wrong("an output is missing"));
        }
        // SAFETY: outputs are live while the kernel runs.
        unsafe { Self::of(value) }
    }

    /// # Safety
    /// `value` is live while the kernel runs.
    unsafe fn of(value: *mut OrtValue) -> ort::Result<Self> {
        let mut element = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        let (mut sizes, mut rank, mut data) = (ptr::null(), 0, ptr::null_mut());
        let api = ort::api();
        // SAFETY: what the caller promises; all others are written by the calls.
        unsafe {
            checked((api.GetTensorElementTypeAndShapeDataReference)(
                value,
                &mut element,
                &mut sizes,
                &mut rank,
            ))?;
            checked((api.GetTensorMutableData)(value, &mut data))?;
        }
        if element != T::TYPE {
            return Err(wrong("a tensor of another type"));
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

fn checked(status: OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: the status is the call's, and is taken once.
    unsafe { ort::Error::result_from_status(status) }
}
