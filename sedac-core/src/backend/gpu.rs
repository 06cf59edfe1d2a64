//! The first NVIDIA GPU, through its driver.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use crate::error::{Error, Result};

/// The first GPU's name; None without a driver or a GPU.
pub(crate) fn gpu_name() -> Option<String> {
    // SAFETY: as in `new_stream`
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    CudaContext::new(0).ok()?.name().ok()
}

/// A new stream of the first GPU, in the driver's primary context, which other libraries use too.
/// Events are not tracked: whoever takes the stream uses its allocations on no other.
///
/// # Errors
/// [`Error::Device`] without a driver or a GPU.
pub(super) fn new_stream() -> Result<Arc<CudaStream>> {
    // SAFETY: loads the driver's library, whose initialisers are NVIDIA's, and nothing more
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device {
            what: "the NVIDIA driver".into(),
            reason: "libcuda is not installed; use --backend onnxruntime --device cpu".into(),
        });
    }
    let context = CudaContext::new(0).map_err(|error| Error::Device {
        what: "the first GPU".into(),
        reason: format!("{error}; check nvidia-smi, or use --backend onnxruntime --device cpu"),
    })?;
    // SAFETY: both backends keep their allocations to themselves and use them on this one stream,
    // whose order is all that is needed; events would be recorded into captured graphs
    unsafe { context.disable_event_tracking() };
    context.new_stream().map_err(failed("a stream"))
}

/// An [`Error::Device`] about `what`.
pub(super) fn failed(what: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    let what = what.into();
    move |error| Error::Device {
        what,
        reason: error.to_string(),
    }
}
